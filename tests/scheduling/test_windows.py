"""Blocks of layers with a sliding window: given back behind it, found again while they are there, never read when not.

One scheduler, steps in flight included, with sequences that share beginnings, are preempted and cancelled. What a step
reads is compared with what should be there, block by block.
"""

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.ids import BlockHash, BlockId, Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.base.window_blocks import WindowBlocks
from disagg.scheduling.capacity import capacity_tokens, most_in_sight
from disagg.scheduling.step.actions import Chunk, Emit, Reject, RunStep
from disagg.scheduling.step.events import AnyEvent, Arrived, Cancelled, StepDone, StepResult
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler

EPOCH = Epoch(1)
BLOCK = 4


@dataclass
class Client:
    num_prompt: int
    num_output: int
    prefix: int
    num_got: int = 0
    is_cancelled: bool = False


@dataclass
class World:
    clients: dict[RequestId, Client]
    window: WindowBlocks
    settings: SchedulerSettings
    num_blocks: int
    now: float = 0.0
    running: deque[RunStep] = field(default_factory=deque)
    contents: dict[BlockId, object] = field(default_factory=dict)
    starts: dict[RequestId, int] = field(default_factory=dict)
    """Where the first chunk of each sequence began."""

    def __post_init__(self) -> None:
        self.scheduler = StepScheduler(self.settings, self.num_blocks, BLOCK, memory=KvMemory(window=self.window))
        self.in_sight = most_in_sight(self.window, self.settings, BLOCK)

    def arrive(self, name: RequestId) -> None:
        client = self.clients[name]
        names = tuple(BlockHash(bytes([client.prefix, n])) for n in range(client.num_prompt // BLOCK))
        total = client.num_prompt + client.num_output
        self.feed(
            Arrived(
                request_id=name,
                epoch=EPOCH,
                num_tokens=client.num_prompt,
                max_total_tokens=total,
                block_hashes=names,
            )
        )

    def feed(self, event: AnyEvent) -> None:
        self.now += 1.0
        for action in self.scheduler.handle([event], self.now):
            if isinstance(action, RunStep):
                for chunk in action.chunks:
                    self.compute(chunk)
                self.running.append(action)
            elif isinstance(action, Emit):
                for name in action.request_ids:
                    self.clients[name].num_got += 1
            assert not isinstance(action, Reject)
        self.scheduler.validate()

    def end_step(self) -> None:
        step = self.running.popleft()
        results = []
        for chunk in step.chunks:
            client = self.clients[chunk.request_id]
            last = chunk.start + chunk.num_tokens + 1 >= client.num_prompt + client.num_output
            if chunk.samples:
                results.append(StepResult(chunk.request_id, FinishReason.LENGTH if last else None))
        self.feed(StepDone(step_id=step.step_id, results=tuple(results)))

    def finish(self) -> None:
        while self.running:
            self.end_step()

    def compute(self, chunk: Chunk) -> None:
        self.starts.setdefault(chunk.request_id, chunk.start)
        end, each = chunk.start + chunk.num_tokens, self.window.num_each
        num_blocks = -(-end // BLOCK)
        assert len(chunk.window_ids) <= each * min(len(chunk.block_ids), self.in_sight)
        self.use(chunk, dict(enumerate(chunk.block_ids[:num_blocks])), 0)
        first = max(0, chunk.start - self.window.tokens + 1) // BLOCK
        for part in range(each):
            of_part = dict(enumerate(chunk.window_ids[part::each], chunk.first_in_window))
            self.use(chunk, {index: of_part[index] for index in range(first, num_blocks)}, 1 + part)

    def use(self, chunk: Chunk, blocks: dict[int, BlockId], kind: int) -> None:
        client = self.clients[chunk.request_id]
        for index, block in blocks.items():
            is_named = index < client.num_prompt // BLOCK
            meant = (kind, client.prefix if is_named else chunk.request_id, index)
            if index * BLOCK < chunk.start:
                assert self.contents.get(block) == meant
            if (index + 1) * BLOCK > chunk.start:
                self.contents[block] = meant


def num_blocks_of(num_tokens: int, window: WindowBlocks, chosen: SchedulerSettings) -> int:
    """The fewest blocks that hold a sequence, counted rather than solved for."""
    num_kept = -(-num_tokens // BLOCK)
    return num_kept + window.num_each * min(num_kept, most_in_sight(window, chosen, BLOCK))


windows = st.builds(WindowBlocks, st.sampled_from([1, 3, 4, 6, 9]), st.integers(1, 3))
clients = st.lists(
    st.builds(Client, num_prompt=st.integers(1, 40), num_output=st.integers(1, 16), prefix=st.integers(0, 1)),
    min_size=1,
    max_size=6,
)
moves = st.lists(
    st.tuples(st.sampled_from(["step"] * 8 + ["arrive", "arrive", "cancel"]), st.integers(0, 99)), max_size=90
)


@given(
    clients=clients,
    moves=moves,
    window=windows,
    mode=st.sampled_from(SchedulingMode),
    num_in_flight=st.integers(1, 2),
    num_spare=st.integers(0, 12),
)
@settings(max_examples=300, deadline=None)
def test_each_step_reads_what_it_should_and_nothing_is_kept(
    clients: list[Client],
    moves: list[tuple[str, int]],
    window: WindowBlocks,
    mode: SchedulingMode,
    num_in_flight: int,
    num_spare: int,
) -> None:
    chosen = SchedulerSettings(max_batch_tokens=7, max_batch_size=3, max_steps_in_flight=num_in_flight, scheduling=mode)
    num_blocks = num_spare + num_blocks_of(max(one.num_prompt + one.num_output for one in clients), window, chosen)
    world = World({RequestId(f"r{n}"): one for n, one in enumerate(clients)}, window, chosen, num_blocks)
    to_come = list(world.clients)
    for what, number in moves:
        if what == "step" and world.running:
            world.end_step()
        elif what == "arrive" and to_come:
            world.arrive(to_come.pop())
        elif what == "cancel" and (name := RequestId(f"r{number % len(clients)}")) not in to_come:
            world.clients[name].is_cancelled = True
            world.feed(Cancelled(request_id=name, epoch=EPOCH))
    while to_come:
        world.arrive(to_come.pop())
    world.finish()
    for name, client in world.clients.items():
        assert client.is_cancelled or client.num_got == client.num_output, f"{name} got {client.num_got}"
    audit = world.scheduler.audit()
    assert audit.free + audit.cached == audit.total


@given(num_tokens=st.integers(1, 300), window=windows, max_batch_tokens=st.integers(1, 40))
def test_the_longest_sequence_is_as_long_as_the_pool_holds(
    num_tokens: int, window: WindowBlocks, max_batch_tokens: int
) -> None:
    chosen = SchedulerSettings(max_batch_tokens=max_batch_tokens)
    in_sight = most_in_sight(window, chosen, BLOCK)
    num_blocks = num_blocks_of(num_tokens, window, chosen)
    longest = capacity_tokens(num_blocks, BLOCK, None, window, in_sight)
    assert longest >= num_tokens
    assert num_blocks_of(longest, window, chosen) <= num_blocks < num_blocks_of(longest + 1, window, chosen)


WINDOW = WindowBlocks(8, 5)
LONG = 400


def test_a_long_sequence_takes_what_the_arithmetic_says_and_no_more() -> None:
    """Of 100 blocks five more are needed for each of the last two or three."""
    chosen = SchedulerSettings(max_batch_tokens=8)
    name = RequestId("long")
    world = World({name: Client(LONG, 40, 0)}, WINDOW, chosen, num_blocks=200)
    world.arrive(name)
    while world.running:
        world.end_step()
        num_computed = LONG + world.clients[name].num_got - 1
        if world.clients[name].num_got and world.running:
            num_kept = -(-(num_computed + 1) // BLOCK)
            held = num_kept + 5 * (num_kept - WINDOW.first_seen(num_computed, BLOCK))
            assert world.scheduler.num_held_blocks == held <= num_kept + 15


@pytest.mark.parametrize(("num_fork", "expected"), [(LONG, LONG - BLOCK), (200, 200)])
def test_a_prefix_is_gone_on_from_wherever_its_window_is_still_there(num_fork: int, expected: int) -> None:
    """With room for all that was passed, also half-way."""
    names = [RequestId("first"), RequestId("second")]
    clients = dict(zip(names, [Client(LONG, 4, 0), Client(num_fork, 4, 0)], strict=True))
    clients[names[1]].num_prompt += 0 if num_fork == LONG else 3
    world = World(clients, WINDOW, SchedulerSettings(max_batch_tokens=64), num_blocks=1000)
    for name in names:
        world.arrive(name)
        world.finish()
    assert world.starts == {names[0]: 0, names[1]: expected}


def test_a_prefix_whose_window_is_gone_is_computed_again() -> None:
    """Its blocks are there, but what is beside those half-way made room for another sequence."""
    names = [RequestId("first"), RequestId("other"), RequestId("second")]
    clients = dict(zip(names, [Client(LONG, 1, 0), Client(LONG, 1, 1), Client(203, 1, 0)], strict=True))
    num_blocks = 2 * num_blocks_of(LONG + 1, WINDOW, SchedulerSettings(max_batch_tokens=64))
    world = World(clients, WINDOW, SchedulerSettings(max_batch_tokens=64), num_blocks)
    for name in names:
        world.arrive(name)
        world.finish()
    assert world.starts[names[2]] < 200
