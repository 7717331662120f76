"""Blocks on disk are read or computed, whichever brings the first token sooner."""

from collections import Counter
from dataclasses import dataclass, field

import pytest

from disagg.base.config import SchedulerSettings
from disagg.base.ids import BlockHash, Epoch, RequestId
from disagg.base.kv_events import Medium
from disagg.cache.block_tier import BlockTier
from disagg.costs.latency import StepShape
from disagg.costs.step_times import StepTimes
from disagg.scheduling.step.actions import AnyAction, LoadBlocks, RunStep, SaveBlock
from disagg.scheduling.step.events import AnyEvent, Arrived, BlocksRead, StepDone, StepResult, TierRead, TransferDone
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler

BLOCK, TOKEN_S = 10, 0.1
"""A block is computed in a second."""
HOST_BLOCK_S = 0.01


class EvenCosts:
    """A token takes a tenth of a second, wherever it is."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        return (TOKEN_S * shape.num_tokens,)


def names(story: int, count: int) -> tuple[BlockHash, ...]:
    return tuple(BlockHash(bytes([story, n])) for n in range(count))


@dataclass
class Reader:
    """One scheduler, ten blocks of thirty stories on its disk, and what it says."""

    num_blocks: int = 200
    num_in_host: int = 0
    """Leading blocks of each story that are in host memory as well."""
    max_batch_size: int = 8
    gap_s: float = 1e6
    """Between two events."""
    now: float = 0.0
    num_steps: int = 0
    said: list[AnyAction] = field(default_factory=list)

    def __post_init__(self) -> None:
        chosen = SchedulerSettings(max_batch_tokens=1000, max_batch_size=self.max_batch_size)
        saved = tuple(name for story in range(30) for name in names(story, 10))
        in_host = tuple(name for story in range(30) for name in names(story, self.num_in_host))
        times = StepTimes(EvenCosts())
        self.scheduler = StepScheduler(
            chosen,
            self.num_blocks,
            BLOCK,
            times=times,
            memory=KvMemory(tiers=(BlockTier(Medium.CPU, 900, in_host), BlockTier(Medium.DISK, 900, saved))),
        )

    def feed(self, *events: AnyEvent) -> list[AnyAction]:
        self.now += self.gap_s
        actions = self.scheduler.handle(events, self.now)
        self.scheduler.validate()
        self.said += actions
        return actions

    def ask(self, story: int, num_tokens: int = 105, name: str = "") -> list[AnyAction]:
        request_id = RequestId(name or f"story-{story}")
        hashes = names(story, num_tokens // BLOCK)
        return self.feed(
            Arrived(
                request_id=request_id,
                epoch=Epoch(1),
                num_tokens=num_tokens,
                max_total_tokens=num_tokens + 2,
                block_hashes=hashes,
                hand_over=True,
            )
        )

    def learn(self, block_s: float) -> None:
        """Read one story to its end."""
        (load,) = loads(self.ask(29))
        self.end_read(load, block_s)
        self.end_step()

    def end_read(self, load: LoadBlocks, block_s: float) -> list[AnyAction]:
        counts = Counter(block.medium for block in load.blocks)
        block_times = {Medium.DISK: block_s, Medium.CPU: HOST_BLOCK_S}
        return self.feed(
            BlocksRead(reads=tuple(TierRead(one, count, count * block_times[one]) for one, count in counts.items())),
            TransferDone(request_id=load.request_id, epoch=load.epoch),
        )

    def end_step(self) -> list[AnyAction]:
        step = next(action for action in reversed(self.said) if isinstance(action, RunStep))
        results = tuple(StepResult(chunk.request_id) for chunk in step.chunks if chunk.samples)
        return self.feed(StepDone(step_id=step.step_id, results=results))


def loads(actions: list[AnyAction]) -> list[LoadBlocks]:
    return [action for action in actions if isinstance(action, LoadBlocks)]


def computed(actions: list[AnyAction]) -> dict[str, int]:
    """From where on the prompts of the step among these actions are computed."""
    return {chunk.request_id: chunk.start for one in actions if isinstance(one, RunStep) for chunk in one.chunks}


def test_what_nobody_has_read_yet_is_read() -> None:
    (load,) = loads(Reader().ask(0))
    assert len(load.blocks) == 10


@pytest.mark.parametrize(("block_s", "num_read"), [(0.5, 10), (0.99, 10), (1.1, 0), (4.0, 0)])
def test_an_idle_instance_takes_what_is_quicker(block_s: float, num_read: int) -> None:
    reader = Reader()
    reader.learn(block_s)
    actions = reader.ask(0)
    assert sum(len(load.blocks) for load in loads(actions)) == num_read
    assert computed(actions) == ({} if num_read else {"story-0": 0})


def test_what_comes_while_it_waits_is_read_all_the_same() -> None:
    """A prompt of 8 s is before it: of blocks that take 2 s each, four come meanwhile."""
    reader = Reader()
    reader.learn(2.0)
    assert computed(reader.ask(99, 80, name="first")) == {"first": 0}
    (load,) = loads(reader.ask(0))
    assert [block.name for block in load.blocks] == list(names(0, 4))
    reader.end_read(load, 2.0)
    assert computed(reader.end_step()) == {"story-0": 40}


def test_reads_under_way_count() -> None:
    """The blocks of 0.9 s are quicker than computing, but not behind ten others; 5 s of waiting do not help."""
    reader = Reader()
    reader.learn(0.9)
    assert len(loads(reader.ask(0))) == 1
    assert computed(reader.ask(99, 50, name="first")) == {"first": 0}
    assert loads(reader.ask(1)) == []


def test_what_is_in_host_memory_is_read_though_a_slow_disk_has_the_rest() -> None:
    reader = Reader(num_in_host=6)
    reader.learn(4.0)
    (load,) = loads(reader.ask(0))
    assert [block.medium for block in load.blocks] == [Medium.CPU] * 6
    reader.end_read(load, 4.0)
    assert computed(reader.said) == {"story-29": 100, "story-0": 60}


def test_computing_also_delays_those_that_come_meanwhile() -> None:
    """Computing takes 10 s, reading 12 s. Four have come within ten seconds: as many will wait for half of that."""
    alone = Reader()
    alone.learn(1.2)
    assert loads(alone.ask(0)) == []
    among_others = Reader(gap_s=1.0)
    among_others.learn(1.2)
    for number in range(3):
        among_others.ask(99, 10, name=f"short-{number}")
        among_others.end_step()
    assert len(loads(among_others.ask(0))) == 1


def test_a_disk_that_was_slow_once_is_tried_again() -> None:
    reader = Reader(num_blocks=400)
    reader.learn(1.2)
    num_computed = 0
    while not loads(reader.ask(num_computed)):
        num_computed += 1
        reader.end_step()
    assert 3 < num_computed < 15


def test_what_goes_on_elsewhere_is_written_to_all_tiers() -> None:
    reader = Reader()
    reader.ask(99, 25)
    reader.end_step()
    written = {(save.medium, save.name) for save in reader.said if isinstance(save, SaveBlock)}
    assert written == {(medium, name) for medium in (Medium.CPU, Medium.DISK) for name in names(99, 2)}


class TestReadingAhead:
    def test_a_read_begins_while_others_wait_and_they_are_served_first(self) -> None:
        reader = Reader()
        reader.learn(0.1)
        reader.ask(99, 1500, name="first")
        reader.ask(98, 200, name="second")
        (load,) = loads(reader.ask(0))
        reader.end_read(load, 0.1)
        step = reader.end_step()
        assert list(computed(step)) == ["first", "second", "story-0"]

    def test_not_with_blocks_that_they_need(self) -> None:
        reader = Reader(num_blocks=180)
        reader.learn(0.1)
        reader.ask(99, 1500, name="first")
        reader.ask(98, 200, name="second")
        assert loads(reader.ask(0)) == []

    def test_not_in_their_places(self) -> None:
        reader = Reader(max_batch_size=2)
        reader.learn(0.1)
        reader.ask(99, 1500, name="first")
        reader.ask(98, 200, name="second")
        assert loads(reader.ask(0)) == []
