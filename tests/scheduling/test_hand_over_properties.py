"""Two schedulers, a prefill and a decode instance, joined by a network that delays, reorders, repeats and loses.

Whatever happens (cancellations, failed pulls, expired leases, the death of the prefill instance): the books are right
after every event, no step reads a block that holds something else than what it should, every sequence that is not
cancelled gets all of its tokens, and in the end no block is held. Prompts are offered whole, or in parts as well, the
last of them behind the step that writes it; what comes of that one may be spoiled. Some models have layers with a
sliding window, in blocks of their own, which need not be there behind the window. Blocks of the two may be of unequal
size; what each holds is counted in pieces of the smaller.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.base.sampling import FinishReason
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.block_pool import BlockState
from disagg.scheduling.capacity import most_in_sight
from disagg.scheduling.hand_over import hand_overs
from disagg.scheduling.instance.foreign_blocks import in_own_blocks, pieces
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import SequenceFacts
from disagg.scheduling.instance.tracked import kv_extended, kv_offer, kv_offered
from disagg.scheduling.step.actions import (
    AnyAction,
    BlockCopy,
    Chunk,
    Emit,
    Forget,
    OfferKv,
    OfferPart,
    Pull,
    ReleaseLease,
    RunStep,
    StopPull,
    WakeAt,
)
from disagg.scheduling.step.events import (
    AnyEvent,
    Arrived,
    Cancelled,
    KvExtended,
    KvOffered,
    LeaseReleased,
    SourceLost,
    StepDone,
    StepResult,
    Tick,
    TransferDone,
    TransferEnded,
    TransferFailed,
)
from disagg.scheduling.step.kv_ledger import KvMemory
from disagg.scheduling.step.scheduler import StepScheduler

PREFILL, DECODE = InstanceId("prefill-0"), InstanceId("decode-0")
EPOCH = Epoch(1)
NUM_BLOCKS, BLOCK = 10, 4
"""Of each pool where its blocks are of this size, which is the smallest."""
LONGEST = 32


@dataclass
class Client:
    num_prompt: int
    num_output: int
    priority: int
    prefix: int
    num_got: int = 0
    cancelled: bool = False
    epoch: Epoch = EPOCH

    @property
    def is_complete(self) -> bool:
        return self.num_got == self.num_output


@dataclass
class World:
    """Instances and the messages on their way; ``draw`` decides what happens next."""

    clients: dict[RequestId, Client]
    mode: SchedulingMode
    window: WindowBlocks | None = None
    shows_progress: bool = False
    prefill_size: int = BLOCK
    decode_size: int = BLOCK
    now: float = 0.0
    on_the_way: list[tuple[InstanceId, AnyEvent]] = field(default_factory=list)
    alarms: dict[InstanceId, float] = field(default_factory=dict)
    writing: dict[RequestId, Pull] = field(default_factory=dict)
    contents: dict[tuple[InstanceId, int, BlockId], dict[int, object]] = field(default_factory=dict)
    """What each block of each life of an instance holds, piece by piece."""
    lives: Counter[InstanceId] = field(default_factory=Counter)
    num_parts: int = 0
    num_whole_pulls: int = 0
    """Those of what the parts had not brought."""

    def __post_init__(self) -> None:
        self.behind: set[tuple[RequestId, Epoch, int | None]] = set()
        """The parts, by their first blocks, that are read behind a step."""
        self.spoiled: set[tuple[RequestId, Epoch]] = set()
        """What was read so, and came otherwise than it was offered afterwards."""
        self.spoils_next = False
        self.completed: set[tuple[RequestId, Epoch]] = set()
        """Those of which the whole offer has come."""
        self.life_read: dict[RequestId, int] = {}
        self.digests: dict[tuple[RequestId, BlockId], object] = {}
        self.offers: dict[tuple[RequestId, Epoch, int | None], KvOffer] = {}
        """What was offered, whole, and by first block of the decode instance in parts."""
        self.num_spared = 0
        self.sizes = {PREFILL: self.prefill_size, DECODE: self.decode_size}
        self.instances = {name: self.new_instance(name) for name in (PREFILL, DECODE)}

    def new_instance(self, name: InstanceId) -> StepScheduler:
        chosen = SchedulerSettings(max_batch_tokens=6, max_batch_size=3, lease_s=40.0, scheduling=self.mode)
        num_blocks = NUM_BLOCKS * BLOCK // self.sizes[name]
        if self.window is not None:  # as many as the longest sequence takes, and two as without a window
            in_sight = min(LONGEST // BLOCK, most_in_sight(self.window, chosen, BLOCK))
            num_blocks += in_sight * self.window.num_each
        return StepScheduler(chosen, num_blocks, self.sizes[name], memory=self.memory)

    @property
    def memory(self) -> KvMemory:
        return KvMemory(window=self.window, shows_progress=self.shows_progress)

    def hashes(self, client: Client, target: InstanceId) -> tuple[BlockHash, ...]:
        size = self.sizes[target]
        return tuple(BlockHash(bytes([client.prefix, size, n])) for n in range(client.num_prompt // size))

    def arrive(self, name: RequestId, target: InstanceId, hand_over: bool) -> None:
        client = self.clients[name]
        event = Arrived(
            request_id=name,
            epoch=client.epoch,
            num_tokens=client.num_prompt + client.num_got,
            max_total_tokens=client.num_prompt + client.num_output,
            priority=client.priority,
            hand_over=hand_over,
            block_hashes=self.hashes(client, target),
        )
        self.on_the_way.append((target, event))

    def deliver(self, index: int) -> None:
        target, event = self.on_the_way.pop(index % len(self.on_the_way))
        if isinstance(event, Cancelled):  # which no network brings before a part that was sent before
            parts = [entry for entry in self.on_the_way if entry[0] == target and is_part_of(event, entry[1])]
            self.on_the_way = [entry for entry in self.on_the_way if entry not in parts]
            for _, part in parts:
                self.feed(target, part)
        self.feed(target, event)

    def check_that_nobody_uses_what_is_being_written(self) -> None:
        pool = self.instances[DECODE]._books.ledger.pool
        for pull in self.writing.values():
            for copy in pull.copies:
                assert pool.state_of(copy.target) in (BlockState.FILLING, BlockState.QUARANTINED)

    def feed(self, target: InstanceId, event: AnyEvent) -> None:
        self.now += 1.0
        if isinstance(event, TransferDone) and event.request_id in self.writing:
            event = self.copy(target, event)
        elif isinstance(event, KvOffered) and event.is_whole:
            self.completed.add((event.request_id, event.epoch))
            event = structs.replace(event, is_sound=(event.request_id, event.epoch) not in self.spoiled)
        if isinstance(event, TransferDone | TransferEnded) or (isinstance(event, TransferFailed) and event.ended):
            self.writing.pop(event.request_id, None)
        if self.alarms.get(target, 1e18) <= self.now:
            del self.alarms[target]
        actions = self.instances[target].handle([event], self.now)
        self.instances[target].validate()
        self.check_that_nobody_uses_what_is_being_written()
        for action in actions:
            self.carry_out(target, action)

    def copy(self, target: InstanceId, done: TransferDone) -> AnyEvent:
        """Read the blocks of a pull as late as can be. What is not what was offered is found by its digest."""
        pull, client = self.writing[done.request_id], self.clients[done.request_id]
        if (pull.request_id, pull.epoch, pull.part) in self.behind:
            return self.copy_behind(target, pull, done)
        is_sound = True
        for copy in pull.copies:
            content = self.contents[PREFILL, self.life_read[done.request_id], copy.source]
            self.move(content, target, copy)
            is_sound = is_sound and content == self.digests[done.request_id, copy.source]
        # Only what nobody wants any more, or an offer that has ended, may be overwritten.
        is_wanted = not client.cancelled and not client.is_complete and client.epoch == done.epoch
        assert is_sound or not is_wanted or self.now >= pull.expires_s
        return done if is_sound else TransferFailed(request_id=done.request_id, epoch=done.epoch)

    def copy_behind(self, target: InstanceId, pull: Pull, done: TransferDone) -> AnyEvent:
        """Read what a step was writing; whether it is right shows when the whole offer is there."""
        is_spoiled, self.spoils_next = self.spoils_next, False
        for copy in pull.copies:
            content = self.contents[PREFILL, self.life_read[pull.request_id], copy.source]
            self.move(dict.fromkeys(content, "spoiled") if is_spoiled else content, target, copy)
        if not is_spoiled:
            return done
        self.spoiled.add((pull.request_id, pull.epoch))
        is_known = (pull.request_id, pull.epoch) in self.completed
        return TransferFailed(request_id=pull.request_id, epoch=pull.epoch) if is_known else done

    def move(self, content: dict[int, object], target: InstanceId, copy: BlockCopy) -> None:
        """Bring what a block holds, or a part of it, into another block, or a part of that."""
        count = min(self.sizes.values()) // BLOCK
        first, to = (copy.part * count if size // BLOCK > count else 0 for size in self.sizes.values())
        held = self.contents.setdefault((target, self.lives[target], copy.target), {})
        held.update({to + piece: content.get(first + piece) for piece in range(count)})

    def carry_out(self, name: InstanceId, action: AnyAction) -> None:
        match action:
            case RunStep():
                for chunk in action.chunks:
                    self.compute(name, chunk)
                results = tuple(self.sample(chunk.request_id) for chunk in action.chunks if chunk.samples)
                self.on_the_way.append((name, StepDone(step_id=action.step_id, results=results)))
            case Emit():
                for request_id in action.request_ids:
                    self.clients[request_id].num_got += 1
            case OfferKv() | OfferPart():
                self.offer(action)
            case StopPull():
                self.fail_a_pull(ended=True, name=action.request_id)
            case Pull():
                self.num_whole_pulls += action.part is None
                offer = self.offers[action.request_id, action.epoch, action.part]
                copies = pieces(offer, action.copies, self.sizes[name])
                self.writing[action.request_id] = structs.replace(action, copies=copies)
                self.on_the_way.append((name, TransferDone(request_id=action.request_id, epoch=action.epoch)))
            case ReleaseLease():
                self.on_the_way.append((PREFILL, LeaseReleased(request_id=action.request_id, epoch=action.epoch)))
            case WakeAt():
                self.alarms[name] = action.time_s
            case Forget():
                client = self.clients[action.request_id]
                is_wanted = not client.cancelled and not client.is_complete and action.epoch == client.epoch
                assert not is_wanted or action.reason is FinishReason.LENGTH
                if name == PREFILL:  # whoever reads it already is told that nobody goes on with it
                    self.on_the_way.append((DECODE, Cancelled(request_id=action.request_id, epoch=action.epoch)))
            case _:
                raise AssertionError(f"unexpected {action}")

    def offer(self, action: OfferKv | OfferPart) -> None:
        client = self.clients[action.request_id]
        is_whole = isinstance(action, OfferKv)
        self.life_read[action.request_id] = self.lives[PREFILL]
        for block in action.block_ids:
            self.digests[action.request_id, block] = dict(self.contents[PREFILL, self.lives[PREFILL], block])
        if is_whole and self.window is not None:
            num_all = -(-action.num_tokens // BLOCK) * (1 + self.window.num_each)
            self.num_spared += num_all - len(action.block_ids)
        header = InstanceHeader(
            instance=PREFILL, settings=SchedulerSettings(), num_blocks=NUM_BLOCKS, block_size=self.sizes[PREFILL]
        )
        offer = structs.replace(kv_offer(action, header), epoch=client.epoch)
        expires_s = self.now + action.lease_s
        facts = SequenceFacts(
            request_id=action.request_id,
            epoch=client.epoch,
            num_tokens=client.num_prompt + is_whole,
            max_total_tokens=client.num_prompt + client.num_output,
            priority=client.priority,
            block_hashes=self.hashes(client, DECODE),
        )
        if isinstance(action, OfferPart):
            self.num_parts += 1
            offer = structs.replace(offer, first_block=action.first_block, behind_step=action.behind_step)
            own = in_own_blocks(offer, self.sizes[DECODE], ends_open=not action.behind_step)
            if action.behind_step:
                self.behind.add((action.request_id, client.epoch, own.first_block))
            self.offers[action.request_id, client.epoch, own.first_block] = offer
            is_first = not action.first_block
            event = kv_offered(facts, own, expires_s, is_whole=False) if is_first else kv_extended(own, expires_s)
        else:
            self.offers[action.request_id, client.epoch, None] = offer
            event = kv_offered(facts, in_own_blocks(offer, self.sizes[DECODE]), expires_s, is_whole=True)
        self.on_the_way += [(DECODE, event), (DECODE, event)]  # repeated by a nervous network
        if client.cancelled:
            self.on_the_way.append((DECODE, Cancelled(request_id=action.request_id, epoch=client.epoch)))

    def compute(self, name: InstanceId, chunk: Chunk) -> None:
        """A step attends to every block before its chunk that its layers see, and fills those of the chunk."""
        end = chunk.start + chunk.num_tokens
        num_blocks = -(-end // self.sizes[name])
        self.use(name, chunk, dict(enumerate(chunk.block_ids[:num_blocks])), 0)
        each = 0 if self.window is None else self.window.num_each
        for part in range(each):
            of_part = dict(enumerate(chunk.window_ids[part::each], chunk.first_in_window))
            first_seen = max(0, chunk.start - self.window.tokens + 1) if self.window else 0
            used = {index: of_part[index] for index in range(first_seen // BLOCK, num_blocks)}
            self.use(name, chunk, used, 1 + part)

    def use(self, name: InstanceId, chunk: Chunk, blocks: dict[int, BlockId], kind: int) -> None:
        num_each, end = self.sizes[name] // BLOCK, chunk.start + chunk.num_tokens
        for index, block in blocks.items():
            held = self.contents.setdefault((name, self.lives[name], block), {})
            for inside in range(num_each):
                piece = index * num_each + inside
                meant = (kind, self.meant(chunk.request_id, piece))
                if piece * BLOCK < chunk.start:
                    assert held.get(inside) == meant, f"{chunk.request_id} reads {kind} of {piece} on {name}"
                if chunk.start < (piece + 1) * BLOCK and piece * BLOCK < end:
                    held[inside] = meant

    def meant(self, name: RequestId, index: int) -> object:
        """What a piece of a sequence holds: full ones of equal prompts are equal."""
        client = self.clients[name]
        return (client.prefix, index) if index < client.num_prompt // BLOCK else (name, index)

    def sample(self, name: RequestId) -> StepResult:
        client = self.clients[name]
        last = client.num_got + 1 >= client.num_output
        return StepResult(name, FinishReason.LENGTH if last else None)

    def cancel(self, name: RequestId) -> None:
        self.clients[name].cancelled = True
        for target in self.instances:
            self.on_the_way.append((target, Cancelled(request_id=name, epoch=self.clients[name].epoch)))

    def fail_a_pull(self, ended: bool, name: RequestId | None = None) -> None:
        for index, (target, event) in enumerate(self.on_the_way):
            if isinstance(event, TransferDone) and name in (None, event.request_id):
                failed = TransferFailed(request_id=event.request_id, epoch=event.epoch, ended=ended)
                self.on_the_way[index] = (target, failed)
                if not ended:
                    self.feed(target, self.on_the_way.pop(index)[1])
                    self.on_the_way.append((target, TransferEnded(request_id=event.request_id, epoch=event.epoch)))
                return

    def kill_prefill(self) -> None:
        """The process is gone with its blocks; what it had not handed over is sent to the decode instance."""
        self.instances[PREFILL] = self.new_instance(PREFILL)
        self.lives[PREFILL] += 1
        self.alarms.pop(PREFILL, None)
        lost = [event for target, event in self.on_the_way if target == PREFILL]
        self.on_the_way = [entry for entry in self.on_the_way if entry[0] != PREFILL]
        self.on_the_way.append((DECODE, SourceLost(instance=PREFILL)))
        held = {event.request_id for event in lost if isinstance(event, Arrived)}
        for event in lost:
            if isinstance(event, StepDone):
                held |= {result.request_id for result in event.results}
        for name, client in self.clients.items():
            is_whole = [e.is_whole for _, e in self.on_the_way if isinstance(e, KvOffered) and e.request_id == name]
            if client.num_got == 0 and not client.cancelled and not any(is_whole):
                # What it has read of the sequence already is of no use to anybody.
                self.on_the_way.append((DECODE, Cancelled(request_id=name, epoch=client.epoch)))
                client.epoch = Epoch(client.epoch + 1)
                self.arrive(name, DECODE, hand_over=False)

    def settle(self) -> None:
        """Deliver everything in order; when nothing is on the way, let time pass to the next alarm."""
        for _ in range(20_000):
            if self.on_the_way:
                self.deliver(0)
            elif self.alarms:
                target = min(self.alarms, key=lambda name: self.alarms[name])
                self.now = max(self.now, self.alarms.pop(target))
                self.feed(target, Tick())
            else:
                return
        raise AssertionError("the world does not come to rest")


def is_part_of(cancelled: Cancelled, event: AnyEvent) -> bool:
    is_part = isinstance(event, KvExtended) or (isinstance(event, KvOffered) and not event.is_whole)
    return is_part and (event.request_id, event.epoch) == (cancelled.request_id, cancelled.epoch)


clients = st.lists(
    st.builds(
        Client,
        num_prompt=st.integers(1, 20),
        num_output=st.integers(1, 12),
        priority=st.integers(0, 1),
        prefix=st.integers(0, 2),
    ),
    min_size=1,
    max_size=7,
)
steps = st.lists(
    st.tuples(
        st.sampled_from(["deliver"] * 12 + ["cancel", "fail", "fail_late", "spoil", "wait", "kill"]), st.integers(0, 99)
    ),
    max_size=120,
)


@given(
    clients=clients,
    steps=steps,
    mode=st.sampled_from(SchedulingMode),
    least_part_tokens=st.sampled_from([BLOCK, hand_overs.LEAST_PART_TOKENS]),
    window=st.one_of(st.none(), st.builds(WindowBlocks, st.sampled_from([1, 5, 8, 11]), st.integers(1, 3))),
    shows_progress=st.booleans(),
    sizes=st.sampled_from([(BLOCK, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, BLOCK)]),
)
@settings(max_examples=400, deadline=None)
def test_nothing_is_lost_and_nothing_is_kept(
    clients: list[Client],
    steps: list[tuple[str, int]],
    mode: SchedulingMode,
    least_part_tokens: int,
    window: WindowBlocks | None,
    shows_progress: bool,
    sizes: tuple[int, int],
) -> None:
    if window is not None:
        sizes = (BLOCK, BLOCK)
    names = {RequestId(f"r{n}"): client for n, client in enumerate(clients)}
    world = World(names, mode, window, shows_progress, *sizes)
    with mock.patch.object(hand_overs, "LEAST_PART_TOKENS", least_part_tokens):
        go_through(world, steps)
    for name, client in world.clients.items():
        assert client.cancelled or client.is_complete, f"{name} got {client.num_got} of {client.num_output} tokens"
    for scheduler in world.instances.values():
        audit = scheduler.audit()
        assert audit.free + audit.cached == audit.total
        load = scheduler.load()
        assert (load.num_running, load.num_waiting, load.num_leases) == (0, 0, 0)


def go_through(world: World, steps: list[tuple[str, int]]) -> None:
    """Let everything happen, and then come to rest."""
    for name in world.clients:
        world.arrive(name, PREFILL, hand_over=True)
    killed = False
    for what, number in steps:
        if what == "deliver" and world.on_the_way:
            world.deliver(number)
        elif what == "cancel":
            world.cancel(RequestId(f"r{number % len(world.clients)}"))
        elif what in ("fail", "fail_late"):
            world.fail_a_pull(ended=what == "fail")
        elif what == "spoil":
            world.spoils_next = True
        elif what == "wait":
            world.now += 25.0
        elif what == "kill" and not killed:
            killed = True
            world.kill_prefill()
    world.settle()


def alone(
    num_prompt: int, least_part_tokens: int = BLOCK, steps: list[tuple[str, int]] | None = None, *changes: Any
) -> World:
    """What became of a prompt that nobody disturbs, in steps of six tokens."""
    name = RequestId("r0")
    client = Client(num_prompt=num_prompt, num_output=3, priority=0, prefix=0)
    world = World({name: client}, SchedulingMode.CHUNKED, *changes)
    with mock.patch.object(hand_overs, "LEAST_PART_TOKENS", least_part_tokens):
        world.arrive(name, PREFILL, hand_over=True)
        go_through(world, steps or [])
    assert client.is_complete
    return world


def test_a_prompt_is_read_part_by_part_while_it_is_computed() -> None:
    """Three parts of a prompt of twenty tokens; the rest is pulled after the first token."""
    assert alone(20).num_parts == 3


@pytest.mark.parametrize("is_spoiled", [False, True], ids=["sound", "spoiled"])
def test_what_was_read_behind_the_last_step_is_pulled_again_only_if_it_came_otherwise(is_spoiled: bool) -> None:
    world = alone(20, BLOCK, [("spoil", 0)] * is_spoiled, None, True)
    assert (world.num_parts, world.num_whole_pulls) == (4, is_spoiled)


@pytest.mark.parametrize("sizes", [(BLOCK, 2 * BLOCK), (2 * BLOCK, BLOCK)], ids=str)
def test_blocks_of_another_size_are_read_part_by_part_and_behind_the_last_step(sizes: tuple[int, int]) -> None:
    world = alone(24, 2 * BLOCK, [], None, True, *sizes)
    assert (world.num_parts, world.num_whole_pulls) == (3, 0)


def test_a_part_that_ends_within_a_larger_block_waits_for_the_whole() -> None:
    """Parts of four tokens, read into blocks of eight: the second one begins where no block does."""
    world = alone(20, BLOCK, [], None, True, BLOCK, 2 * BLOCK)
    assert (world.num_parts, world.num_whole_pulls) == (4, 1)


def test_sliding_layers_of_blocks_behind_the_window_are_not_read() -> None:
    """Of five blocks the token after twenty tokens sees positions 16 to 20 with a window of five: the last block."""
    assert alone(20, BLOCK, [], WindowBlocks(5, 1)).num_spared == 4
