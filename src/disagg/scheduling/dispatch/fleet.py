"""The instances as dispatch knows them, and the load that each sequence puts on them. Pure."""

from collections.abc import Iterable, Mapping
from typing import Final

from disagg.base.errors import InternalError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.base.router_messages import ForeignLoad
from disagg.scheduling.dispatch.events import (
    AnyLesson,
    CostsKnown,
    ForeignLoadKnown,
    InstanceUp,
    Join,
    LinkKnown,
    ProcessStarting,
)
from disagg.scheduling.dispatch.load_index import ReadyInstances
from disagg.scheduling.dispatch.state import READ_ALREADY, Charge, InstanceEntry, InstanceState, KvLink, SequenceEntry

_NO_CHARGE: Final = Charge()


class Fleet:
    """All instances by name, in the order in which they were configured or joined."""

    def __init__(self, instances: Mapping[InstanceId, Role]) -> None:
        self._by_name: dict[InstanceId, InstanceEntry] = {}
        self._num_joined = 0
        self.entries: tuple[InstanceEntry, ...] = ()
        """Not to be changed: read by every choice."""
        self.draining: set[InstanceId] = set()
        """Those that give away what they hold. Not to be changed."""
        self._ready: ReadyInstances | None = None
        self.version = 0
        """Another one whenever an instance has come, gone, or changed its state or its role."""
        for name, role in instances.items():
            self._join(name, role)

    def entry(self, instance: InstanceId) -> InstanceEntry:
        """Return an instance by name; raise InternalError, naming those there are."""
        entry = self._by_name.get(instance)
        if entry is None:
            raise InternalError(f"instance {instance!r} is not one of {', '.join(self._by_name)}")
        return entry

    def find(self, instance: InstanceId) -> InstanceEntry | None:
        """Return an instance by name; None where there is none."""
        return self._by_name.get(instance)

    @property
    def ready(self) -> ReadyInstances:
        """The instances that take new sequences now, in order of load."""
        if self._ready is None:
            self._ready = ReadyInstances(self.entries)
        return self._ready

    def _join(self, instance: InstanceId, role: Role) -> None:
        if instance in self._by_name:
            raise InternalError(f"instance {instance} joined twice")
        self._by_name[instance] = InstanceEntry(instance, role, order=self._num_joined)
        self._num_joined += 1
        self._list()

    def _list(self) -> None:
        self.entries = tuple(self._by_name.values())
        self._sort_anew()

    def _sort_anew(self) -> None:
        self._ready = None
        self.version += 1

    def _move(self, entry: InstanceEntry, state: InstanceState) -> None:
        """Change a state: who is ready is sorted anew before the next choice."""
        entry.state = state
        self._sort_anew()
        if state is InstanceState.DRAINING:
            self.draining.add(entry.instance)
        else:
            self.draining.discard(entry.instance)

    def up(self, event: InstanceUp) -> None:
        """An instance takes sequences; raise InternalError when it did already."""
        entry = self.entry(event.instance)
        if entry.is_alive:
            raise InternalError(f"instance {event.instance} came up twice without going down")
        self._move(entry, InstanceState.DRAINING if entry.is_cordoned else InstanceState.READY)
        entry.capacity = event.max_total_tokens
        entry.pool_tokens, entry.window = event.pool_tokens, event.window
        entry.limits = event.limits
        self._set_foreign(entry, ForeignLoad())
        self.set_untold(entry.instance, 0)

    def drain(self, instance: InstanceId) -> bool:
        """Give an instance nothing new; return True when it holds nothing. Raise InternalError unless it is ready."""
        entry = self.entry(instance)
        if entry.state is not InstanceState.READY:
            raise InternalError(f"instance {instance} cannot drain: it is {entry.state.value}")
        entry.is_cordoned = True
        self._move(entry, InstanceState.DRAINING)
        return not entry.num_sequences

    def undrain(self, instance: InstanceId) -> None:
        """Let an instance get sequences again, once it is up."""
        entry = self.entry(instance)
        entry.is_cordoned = False
        if entry.state is InstanceState.DRAINING:
            self._move(entry, InstanceState.READY)

    def lose(self, instance: InstanceId, state: InstanceState) -> bool:
        """An instance takes nothing any more; return whether it did until now."""
        entry = self.entry(instance)
        was_alive = entry.is_alive
        self._move(entry, state)
        return was_alive

    def change_role(self, instance: InstanceId, role: Role) -> InstanceEntry:
        """Let an instance get sequences of another role from now on, and return it."""
        entry = self.entry(instance)
        entry.role = role
        self._sort_anew()
        return entry

    def remove(self, instance: InstanceId) -> None:
        """Forget an instance that nobody is on any more."""
        del self._by_name[instance]
        self.draining.discard(instance)
        self._list()

    def charge(self, sequence: SequenceEntry, instance: InstanceId, charge: Charge, now: float) -> None:
        """Set the sequence's part of an instance's load."""
        entry = self._by_name[instance]
        before = sequence.charges.get(instance)
        if before is None:
            before = _NO_CHARGE
            entry.num_sequences += 1
        was, is_now = before.prefill_tokens, charge.prefill_tokens
        if is_now != was:
            entry.prefill_tokens += is_now - was
            entry.prefill_squares += is_now**2 - was**2
            if not (is_now and was):
                if was or not entry.num_prefills:
                    entry.prefilling_since_s = now
                entry.num_prefills += 1 if is_now else -1
                if is_now:
                    entry.prompts[sequence.request_id] = sequence
                else:
                    del entry.prompts[sequence.request_id]
        entry.kv_tokens += charge.kv_tokens - before.kv_tokens
        if self._ready is not None and (is_now < was or charge.kv_tokens < before.kv_tokens):
            self._ready.fell(entry)
        if charge.is_decoding:
            entry.answers[sequence.request_id] = sequence
        elif before.is_decoding:
            del entry.answers[sequence.request_id]
        sequence.charges[instance] = charge

    def came_on(self, sequence: SequenceEntry, instance: InstanceId, now: float) -> None:
        """Let a sequence's part of the load of an instance be all its tokens, of which more have come from there."""
        known = sequence.charges[instance]
        if known.is_decoding:
            self._by_name[instance].kv_tokens += sequence.num_tokens - known.kv_tokens
            known.kv_tokens = sequence.num_tokens
        else:
            is_decoding = sequence.state not in READ_ALREADY
            self.charge(sequence, instance, Charge(kv_tokens=sequence.num_tokens, is_decoding=is_decoding), now)

    def set_untold(self, instance: InstanceId, num_tokens: int) -> None:
        """Let so many tokens, of sequences that are there, be part of an instance's load, in sum alone."""
        entry = self._by_name.get(instance)
        if entry is None or num_tokens == entry.untold_tokens:
            return
        change = num_tokens - entry.untold_tokens
        entry.untold_tokens = num_tokens
        entry.kv_tokens += change
        if change < 0 and self._ready is not None:
            self._ready.fell(entry)

    def discharge(self, sequence: SequenceEntry, instance: InstanceId, now: float) -> bool:
        """Take the sequence's part off an instance's load; return True when the last one has left a draining one."""
        self.charge(sequence, instance, _NO_CHARGE, now)
        del sequence.charges[instance]
        entry = self._by_name[instance]
        entry.num_sequences -= 1
        return entry.state is InstanceState.DRAINING and not entry.num_sequences

    def expect(self, sequence: SequenceEntry, instance: InstanceId) -> None:
        """Let an instance expect to decode a sequence that it, or another one, prefills."""
        entry = self._by_name[instance]
        entry.expected[sequence.request_id] = sequence
        entry.expected_tokens += sequence.num_tokens
        sequence.expected = (instance, sequence.num_tokens)

    def expect_no_more(self, sequence: SequenceEntry) -> None:
        """The sequence has come, or goes elsewhere."""
        if sequence.expected is None:
            return
        instance, num_tokens = sequence.expected
        sequence.expected = None
        entry = self._by_name.get(instance)
        if entry is not None:
            del entry.expected[sequence.request_id]
            entry.expected_tokens -= num_tokens

    def take(self, event: ProcessStarting | Join | AnyLesson) -> None:
        """Take account of what changes no sequence's place. Raises InternalError when an instance joins twice."""
        match event:
            case ProcessStarting(instance=instance):
                entry = self.entry(instance)
                if not entry.is_alive:
                    self._move(entry, InstanceState.STARTING)
            case Join(instance=instance, role=role):
                self._join(instance, role)
            case CostsKnown(lesson=costs):
                self.entry(costs.instance).lesson = costs
            case LinkKnown(source=source, target=target, latency_s=latency_s, token_s=token_s):
                self.entry(target).reads[source] = KvLink(latency_s, token_s)
            case ForeignLoadKnown(instance=instance, load=load):
                self._set_foreign(self.entry(instance), load)

    def link_s(self, sequence: SequenceEntry) -> float | None:
        """Return what its measured link says that a sequence's blocks take to who pulls them; None: not measured."""
        source, target = sequence.lease, sequence.holder
        link = None if source is None or target is None else self._by_name[target].reads.get(source)
        return None if link is None else link.transfer_time_s(sequence.num_tokens)

    def describe(self) -> str:
        """Return names, states and capacities in words."""
        return ", ".join(entry.describe() for entry in self.entries)

    def validate(self, sequences: Iterable[SequenceEntry]) -> None:
        """Raise InternalError unless each load is that of the sequences, and all of them are on live instances."""
        totals = {name: Charge() for name in self._by_name}
        for sequence in sequences:
            for name in (sequence.holder, sequence.lease, sequence.reader):
                if name is not None and not self._by_name[name].is_alive:
                    sequence.refuse_event(f"being with {name}, which is not live")
            for name, charge in sequence.charges.items():
                totals[name].prefill_tokens += charge.prefill_tokens
                totals[name].kv_tokens += charge.kv_tokens
        for name, entry in self._by_name.items():
            own = Charge(
                entry.prefill_tokens - entry.foreign.prefill_tokens,
                entry.kv_tokens - entry.foreign.kv_tokens - entry.untold_tokens,
            )
            if own != totals[name]:
                raise InternalError(f"the load of {entry.describe()} is not that of its sequences, {totals[name]}")
        self.ready.validate()

    def _set_foreign(self, entry: InstanceEntry, load: ForeignLoad) -> None:
        """Let what others have put on an instance be part of its load."""
        before, entry.foreign = entry.foreign, load
        entry.prefill_tokens += load.prefill_tokens - before.prefill_tokens
        entry.prefill_squares += load.prefill_squares - before.prefill_squares
        entry.num_prefills += load.num_prefills - before.num_prefills
        entry.kv_tokens += load.kv_tokens - before.kv_tokens
        if self._ready is not None:
            self._ready.fell(entry)
