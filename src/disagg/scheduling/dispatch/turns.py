"""Sequences until an instance has them: whether they are taken, whose turn it is, and where that one goes. Pure.

It joins ``admission``, ``waiting_room`` and ``pathfinder``, each of which decides one thing, and keeps their books.
"""

import math
from collections.abc import Collection, Mapping

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.ids import InstanceId, RequestId
from disagg.base.request import Role
from disagg.base.service_classes import Overload
from disagg.cache.prefix_index import HeldPrefix
from disagg.scheduling.dispatch.actions import Degrade, Refuse, SendPart
from disagg.scheduling.dispatch.admission import over_bounds, overload_of, shed, unserved
from disagg.scheduling.dispatch.choice import can_be_served, compared_to_adopt, compared_to_start
from disagg.scheduling.dispatch.events import PartMade
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.moves import Move, choose_move
from disagg.scheduling.dispatch.pathfinder import HeldBack, Pathfinder, Placed
from disagg.scheduling.dispatch.state import Charge, InstanceEntry, InstanceState, SequenceEntry, Whereabouts
from disagg.scheduling.dispatch.waiting_room import WaitingRoom
from disagg.scheduling.dispatch.workload import WorkloadWindow


class Turns:
    """The sequences that no instance has started, and what was learned from those that have ended."""

    def __init__(self, settings: RouterSettings, scheduler: SchedulerSettings, fleet: Fleet) -> None:
        self._settings = settings
        self._fleet = fleet
        self.room = WaitingRoom(settings.tenants)
        """Who waits, and what other routers say of those who share the server."""
        self._paths = Pathfinder(settings, scheduler, self.room)
        self._kept_out: str | None = None
        """The tenant whose sequence was the last to be held back for others'."""
        self.workload = WorkloadWindow()
        self.experience = self._paths.experience

    def take(self, sequence: SequenceEntry, num_all: int, now: float) -> Refuse | Degrade | None:
        """Let a sequence that has just arrived wait for its turn, or return why not; best effort is taken, too.

        ``num_all`` sequences are under way already.
        """
        watches = self._settings.watches_workload
        if watches:
            self.workload.arrived(sequence.num_tokens, now)
        sequence.rank = self._paths.rank_of(sequence)
        verdict = self._verdict(sequence, num_all, now)
        if verdict is None:
            self._paths.note_admitted(sequence, now)
        if not isinstance(verdict, Refuse):
            self.room.enter(sequence)
            self._paths.note_arrival(sequence, now)
            if watches:
                self.workload.take(sequence)
        return verdict

    def is_judged(self, sequence: SequenceEntry) -> bool:
        """Return whether it matters that the sequence is predicted to miss."""
        return overload_of(sequence, self._settings) is not Overload.QUEUE

    def _verdict(self, sequence: SequenceEntry, num_all: int, now: float) -> Refuse | Degrade | None:
        settings = self._settings
        refusal = over_bounds(sequence, settings, num_all, self.room.num_under_way(sequence.tenant))
        if refusal is not None:
            return refusal
        if not can_be_served(self._fleet, sequence, strict_roles=settings.has_walls):
            return unserved(sequence, self._fleet.describe())
        if not self.is_judged(sequence):
            return None
        miss = self._paths.miss(self._fleet, sequence, now)
        if miss is None:
            return None
        if overload_of(sequence, settings) is Overload.SHED:
            return shed(sequence, miss)
        sequence.degrade()
        return Degrade(request_id=sequence.request_id, epoch=sequence.epoch, why=miss.why)

    def next(self, passed: Collection[RequestId]) -> SequenceEntry | None:
        """Return whose turn it is, those who were passed over left out."""
        return self.room.head(passed)

    def passed_over(self, sequence: SequenceEntry) -> Collection[RequestId]:
        """Return who lets others go first, of one whose turn it is and that does not start; nobody where all wait.

        It alone where it waits for an instance to come up, all of its tenant's where room is kept for other tenants.
        """
        if not math.isinf(sequence.wait_until_s):
            return (sequence.request_id,)
        if sequence.tenant != self._kept_out:
            return ()
        return [one.request_id for one in self.room.waiting_of(sequence.tenant)]

    def start(self, sequence: SequenceEntry, now: float) -> Placed | HeldBack | None:
        """Return where a sequence whose turn it is starts, or that it waits on, with a time or without."""
        start = self._paths.start(self._fleet, sequence, now)
        self._kept_out = sequence.tenant if isinstance(start, HeldBack) and start.for_guests else None
        if isinstance(start, Placed):
            self.room.stop_waiting(sequence)
            self.room.served(sequence, num_input=sequence.num_tokens)
            self.workload.started(sequence, start.instance, now)
            self._paths.note_start(self._fleet, start, sequence, now)
            sequence.assign(start.instance.instance, start.chosen, start.other, now)
            if start.chosen is not None and not sequence.ends_at_first_token:
                self._fleet.expect(sequence, start.chosen.path.decode)
        elif start is not None:
            self._paths.note_held_back(now)
        return start

    def start_again(self, sequence: SequenceEntry) -> None:
        """Let a sequence that lost its instance wait for its turn."""
        self._fleet.expect_no_more(sequence)
        self.room.wait(sequence)

    def compared(self, sequence: SequenceEntry, held: Mapping[InstanceId, HeldPrefix]) -> list[InstanceEntry]:
        """Return the instances whose KV tokens decide where a sequence starts, or goes on once it is offered.

        That those of the others have grown meanwhile changes nothing.
        """
        sequence.held = held
        if sequence.state is Whereabouts.QUEUED:
            return compared_to_start(self._fleet, sequence)
        if sequence.reader is not None:
            return []
        return [entry for entry in compared_to_adopt(self._fleet, sequence) if entry is not None]

    def adopter(self, sequence: SequenceEntry, now: float) -> InstanceEntry | None:
        """Return the instance that goes on with an offered sequence; None when none can take it now.

        One that reads it already does.
        """
        reader = None if sequence.reader is None else self._fleet.entry(sequence.reader)
        if reader is not None and reader.state is InstanceState.READY and reader.role is not Role.PREFILL:
            return reader
        adopter = self._paths.adopt(self._fleet, sequence, now)
        if adopter is not None:
            self._fleet.expect_no_more(sequence)
        return adopter

    def read_early(self, sequence: SequenceEntry, part: PartMade, now: float) -> SendPart | None:
        """Choose who goes on with a sequence while it is being prefilled; return what lets that one read this part."""
        if sequence.state is not Whereabouts.PREFILLING:
            return None
        if part.is_first and sequence.reader is None and (reader := self.adopter(sequence, now)) is not None:
            sequence.reader = reader.instance
            self._fleet.charge(sequence, reader.instance, Charge(kv_tokens=sequence.num_tokens), now)
        if sequence.reader is None:
            return None
        return SendPart(
            request_id=sequence.request_id,
            epoch=sequence.epoch,
            instance=sequence.reader,
            is_first=part.is_first,
        )

    def choose_move(self, sequence: SequenceEntry, now: float) -> Move | None:
        """Return how a running sequence moves to another instance; None while none can go on with it."""
        return choose_move(self._fleet, sequence, self._paths.forecaster(self._fleet, now))

    def note_tokens(self, sequence: SequenceEntry, count: int, now: float) -> None:
        """Take account of tokens that a sequence brought."""
        if not sequence.num_answer_tokens:
            self._paths.note_first_token(sequence, now)
        sequence.note_tokens(count, now)
        if sequence.expected is not None and sequence.holder == sequence.expected[0]:
            self._fleet.expect_no_more(sequence)
        if sequence.sample is not None:
            self.workload.brought(sequence)
        self.room.served(sequence, num_output=count)

    def note_hand_over(self, sequence: SequenceEntry, duration_s: float) -> None:
        """Take account of KV blocks that have arrived."""
        sequence.hand_over_s = duration_s
        self._paths.experience.hand_over_ended(sequence.num_tokens, duration_s, self._fleet.link_s(sequence))

    def finished(self, sequence: SequenceEntry) -> None:
        """Learn from a sequence that came to its end."""
        self.workload.ended(sequence, has_kept=sequence.keeps(self._paths.objectives_of(sequence)))
        self._paths.note_end(sequence)
        self._paths.experience.answer_ended(sequence.num_answer_tokens)

    def leave(self, sequence: SequenceEntry) -> None:
        """Forget a sequence, in whatever state it is."""
        if sequence.state is Whereabouts.QUEUED:
            self.room.stop_waiting(sequence)
        self.room.leave(sequence)
        self._fleet.expect_no_more(sequence)
