"""One scheduler with a disk, that lends and borrows, while everything on the way is delayed, reordered or fails.

Whatever happens: the books are right after every event, what is read and written stays as it is meanwhile, the events
say exactly what is cached where, every sequence that is not cancelled gets its tokens, and in the end no block is held.
"""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from disagg.base.config import SchedulerSettings
from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Medium
from disagg.base.sampling import FinishReason
from disagg.cache.block_pool import BlockState
from disagg.cache.block_tier import BlockTier
from disagg.scheduling.step.actions import (
    AnyAction,
    DropSaved,
    Emit,
    Forget,
    LendKv,
    LoadBlocks,
    Pull,
    ReleaseLease,
    RunStep,
    SaveBlock,
    WakeAt,
)
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    BlockSaved,
    BlocksRead,
    Cancelled,
    KvWanted,
    LeaseReleased,
    LentKv,
    StepDone,
    StepResult,
    Tick,
    TierRead,
    TransferDone,
    TransferFailed,
)
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler

EPOCH, BLOCK, NUM_BLOCKS = Epoch(1), 4, 12
OTHER = InstanceId("other")


@dataclass
class Client:
    num_prompt: int
    num_output: int
    story: int
    """Clients of one story have equal tokens as far as both reach."""
    num_lent: int
    num_got: int = 0
    cancelled: bool = False

    def names(self, start: int, end: int) -> tuple[BlockHash, ...]:
        return tuple(BlockHash(bytes([self.story, n])) for n in range(start // BLOCK, end // BLOCK))


@dataclass
class World:
    """The instance and what is on its way to it."""

    clients: dict[RequestId, Client]
    block_s: float
    """What reading a block from disk takes, and a tenth of that from the host; computing one takes about a second."""
    has_host: bool
    now: float = 0.0
    on_the_way: list[AnyEvent] = field(default_factory=list)
    loading: dict[RequestId, tuple[BlockId, ...]] = field(default_factory=dict)
    reading: dict[RequestId, BlocksRead] = field(default_factory=dict)
    saving: dict[tuple[Medium, BlockHash], BlockId] = field(default_factory=dict)
    lent: dict[RequestId, tuple[BlockId, ...]] = field(default_factory=dict)
    told: dict[Medium, set[BlockHash]] = field(default_factory=lambda: {medium: set() for medium in Medium})
    alarm_s: float = 1e18

    def __post_init__(self) -> None:
        chosen = SchedulerSettings(max_batch_tokens=8, max_batch_size=3, lease_s=30.0)
        saved = tuple(BlockHash(bytes([story, n])) for story in (0, 1) for n in range(4))
        self.scheduler = StepScheduler(chosen, NUM_BLOCKS, BLOCK, memory=KvMemory(tiers=self.tiers(saved)))
        self.told[Medium.DISK].update(saved)
        self.ledger = self.scheduler._books.ledger

    def arrive(self, name: RequestId) -> None:
        client = self.clients[name]
        num_lent = min(client.num_lent, (client.num_prompt - 1) // BLOCK)
        lent = LentKv(OTHER, tuple(map(BlockId, range(num_lent))), num_lent * BLOCK, self.now + 40.0)
        self.feed(
            Arrived(
                request_id=name,
                epoch=EPOCH,
                num_tokens=client.num_prompt,
                max_total_tokens=client.num_prompt + client.num_output,
                block_hashes=client.names(0, client.num_prompt),
                prefix=lent if num_lent else None,
            )
        )

    def feed(self, event: AnyEvent) -> None:
        self.now += 1.0
        events: list[AnyEvent] = [event]
        if isinstance(event, TransferDone | TransferFailed):
            self.loading.pop(event.request_id, None)
            if (read := self.reading.pop(event.request_id, None)) is not None:
                events.insert(0, read)
        elif isinstance(event, BlockSaved):
            del self.saving[event.medium, event.name]
        elif isinstance(event, LeaseReleased):
            self.lent.pop(event.request_id, None)
        if self.alarm_s <= self.now:
            self.alarm_s = 1e18
            self.lent.clear()  # they may have expired
        actions = self.scheduler.handle(events, self.now)
        self.scheduler.validate()
        for action in actions:
            self.carry_out(action)
        self.hear()
        self.check()

    def carry_out(self, action: AnyAction) -> None:
        match action:
            case RunStep():
                results = tuple(self.sample(chunk.request_id) for chunk in action.chunks if chunk.samples)
                step_s = action.num_tokens / BLOCK
                self.on_the_way.append(StepDone(step_id=action.step_id, results=results, duration_s=step_s))
            case Emit():
                for request_id in action.request_ids:
                    self.clients[request_id].num_got += 1
            case Pull() | LoadBlocks():
                targets = action.copies if isinstance(action, Pull) else action.blocks
                self.loading[action.request_id] = tuple(one.target for one in targets)
                self.on_the_way.append(TransferDone(request_id=action.request_id, epoch=EPOCH))
                if isinstance(action, LoadBlocks):
                    self.reading[action.request_id] = self.read_of(action)
            case SaveBlock():
                self.saving[action.medium, action.name] = action.block
                self.on_the_way.append(BlockSaved(name=action.name, medium=action.medium))
            case LendKv():
                if action.num_tokens:
                    self.lent[action.request_id] = action.block_ids
                    self.on_the_way.append(LeaseReleased(request_id=action.request_id, epoch=EPOCH))
            case WakeAt():
                self.alarm_s = action.time_s
            case Forget():
                assert self.clients[action.request_id].cancelled or action.reason is FinishReason.LENGTH
            case ReleaseLease() | DropSaved():
                pass
            case _:
                raise AssertionError(f"unexpected {action}")

    def tiers(self, saved: tuple[BlockHash, ...]) -> tuple[BlockTier, ...]:
        disk = BlockTier(Medium.DISK, 12, saved)
        return (BlockTier(Medium.CPU, 5), disk) if self.has_host else (disk,)

    def read_of(self, load: LoadBlocks) -> BlocksRead:
        counts = Counter(block.medium for block in load.blocks)
        seconds = {Medium.CPU: 0.1 * self.block_s, Medium.DISK: self.block_s}
        return BlocksRead(reads=tuple(TierRead(one, count, count * seconds[one]) for one, count in counts.items()))

    def sample(self, name: RequestId) -> StepResult:
        client = self.clients[name]
        known = client.num_prompt + client.num_got
        last = client.num_got + 1 >= client.num_output
        return StepResult(name, FinishReason.LENGTH if last else None, client.names(known, known + 1))

    def hear(self) -> None:
        events, _ = self.scheduler.journal.take()
        for event in events:
            assert not isinstance(event, AllBlocksCleared)
            assert isinstance(event, BlockStored | BlockRemoved)
            names = self.told[event.medium]
            (names.update if isinstance(event, BlockStored) else names.difference_update)(event.block_hashes)

    def check(self) -> None:
        pool = self.ledger.pool
        assert self.told[Medium.GPU] == set(pool.published)
        for tier in self.ledger.tiers:
            assert self.told[tier.medium] == set(tier.names)
            assert len(tier) <= tier.max_blocks
        for targets in self.loading.values():
            assert {pool.state_of(target) for target in targets} <= {BlockState.FILLING, BlockState.QUARANTINED}
        for (_, name), block in self.saving.items():
            assert pool.find(name) == block
            assert pool.state_of(block) in (BlockState.ACTIVE, BlockState.LEASED)
        for blocks in self.lent.values():
            assert {pool.state_of(block) for block in blocks} <= {BlockState.ACTIVE, BlockState.LEASED}

    def lend(self, number: int) -> None:
        name = RequestId(f"r{number % len(self.clients)}")
        wanted = RequestId(f"wanted-{name}")
        if wanted not in self.lent:
            names = self.clients[name].names(0, 40)
            self.feed(KvWanted(request_id=wanted, epoch=EPOCH, block_hashes=names))

    def fail(self, number: int) -> None:
        """Let the first thing on its way that can fail do so."""
        for index, event in enumerate(self.on_the_way):
            if isinstance(event, TransferDone):
                name = self.clients[event.request_id].names(0, 40)[number % 4]
                self.on_the_way[index] = TransferFailed(request_id=event.request_id, epoch=EPOCH)
                if (read := self.reading.get(event.request_id)) is not None:
                    first, *others = read.reads
                    failed = structs.replace(first, unreadable=(name,))
                    self.reading[event.request_id] = BlocksRead(reads=(failed, *others))
                return
            if isinstance(event, BlockSaved) and not event.failure:
                self.on_the_way[index] = structs.replace(event, failure="the disk is full")
                return

    def settle(self) -> None:
        for _ in range(5_000):
            if self.on_the_way:
                self.feed(self.on_the_way.pop(0))
            elif self.alarm_s < 1e18:
                self.now = max(self.now, self.alarm_s)
                self.feed(Tick())
            else:
                return
        raise AssertionError("the world does not come to rest")


clients = st.lists(
    st.builds(
        Client,
        num_prompt=st.integers(1, 30),
        num_output=st.integers(1, 12),
        story=st.integers(0, 2),
        num_lent=st.sampled_from([0, 0, 0, 2, 5]),
    ),
    min_size=1,
    max_size=9,
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["deliver"] * 12 + ["arrive"] * 3 + ["cancel", "fail", "lend", "wait"]), st.integers(0, 99)
    ),
    max_size=150,
)


@given(clients=clients, steps=steps, block_s=st.sampled_from([0.0, 0.1, 1.0, 10.0]), has_host=st.booleans())
@settings(max_examples=150, deadline=None)
def test_tiers_keep_what_they_say(
    clients: list[Client], steps: list[tuple[str, int]], block_s: float, has_host: bool
) -> None:
    world = World({RequestId(f"r{n}"): client for n, client in enumerate(clients)}, block_s, has_host)
    to_come = list(world.clients)
    for what, number in steps:
        if what == "deliver" and world.on_the_way:
            world.feed(world.on_the_way.pop(number % len(world.on_the_way)))
        elif what == "arrive" and to_come:
            world.arrive(to_come.pop(0))
        elif what == "cancel":
            name = RequestId(f"r{number % len(clients)}")
            if name not in to_come:
                world.clients[name].cancelled = True
                world.feed(Cancelled(request_id=name, epoch=EPOCH))
        elif what == "fail":
            world.fail(number)
        elif what == "lend":
            world.lend(number)
        elif what == "wait":
            world.now += 25.0
    for name in to_come:
        world.arrive(name)
    world.settle()
    for name, client in world.clients.items():
        assert client.cancelled or client.num_got == client.num_output, f"{name}: {client}"
    audit = world.scheduler.audit()
    assert audit.free + audit.cached == audit.total
    load = world.scheduler.load()
    assert (load.num_running, load.num_waiting, load.num_leases) == (0, 0, 0)
