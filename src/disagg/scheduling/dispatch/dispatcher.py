"""Dispatch: which instance prefills a sequence, which one decodes it, and what happens when one of them dies.

A pure state machine: ``Dispatcher.handle(event, now)`` returns actions; the live router and the simulator carry them
out. Sequences are given to an instance at once and queue there; the dispatcher keeps only those that no live instance
can take, in order of (priority, arrival), for ``instance_wait_s`` at most.

When an instance dies, the sequences that it held are placed again, each in a new epoch, and computed from their known
tokens: what the old epoch still says is out of date. A sequence that was on ``max_instance_losses`` instances when they
died fails with INSTANCE_LOST and their story: it may be what kills them. A sequence whose prefill instance dies while a
decode instance pulls its KV blocks stays where it is: if the pull fails, that instance computes them itself. Sequences
that wait for a dead instance wait on while it is being restarted, and fail with UNAVAILABLE when it is given up.
"""

import math
from collections.abc import Mapping
from typing import Final

from disagg.base.by_type import by_type
from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.cache.prefix_index import HeldPrefix, PrefixIndex
from disagg.scheduling.dispatch import borrowing
from disagg.scheduling.dispatch.actions import (
    AnyDispatchAction,
    Deliver,
    Drained,
    Drop,
    Fail,
    FailReason,
    Finish,
    Refuse,
    Resume,
    SendAbort,
    SendAdopt,
    SendPeerLost,
    SendRelease,
)
from disagg.scheduling.dispatch.choice import matters_who_decodes, why_over, why_unplaceable
from disagg.scheduling.dispatch.events import (
    AnyDispatchEvent,
    ChangeRole,
    CostsKnown,
    Drain,
    ForeignLoadKnown,
    InstanceDown,
    InstanceUp,
    Join,
    Leave,
    LinkKnown,
    NothingLent,
    OfferMade,
    PartMade,
    ProcessStarting,
    Progress,
    PullEnded,
    SequenceArrived,
    SequenceCancelled,
    SequenceFailed,
    TokensEmitted,
    Undrain,
)
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.moves import Move, is_only_with_visited, migrate, movable, send_reader_away
from disagg.scheduling.dispatch.pathfinder import HeldBack
from disagg.scheduling.dispatch.predictions import path_chosen, path_ended
from disagg.scheduling.dispatch.prefixes import choose_lender, held_prefixes, lenders, num_to_compute
from disagg.scheduling.dispatch.state import Charge, InstanceEntry, InstanceState, SequenceEntry, Whereabouts
from disagg.scheduling.dispatch.turns import Turns
from disagg.scheduling.step.actions import WakeAt
from disagg.scheduling.step.events import Tick


class Dispatcher:
    """The state machine. It is changed through ``handle`` alone."""

    def __init__(
        self,
        instances: Mapping[InstanceId, Role],
        settings: RouterSettings,
        scheduler: SchedulerSettings | None = None,
        prefixes: PrefixIndex | None = None,
    ) -> None:
        self._prefixes = PrefixIndex() if prefixes is None else prefixes
        self._settings = settings
        self._fleet = Fleet(instances)
        self._turns = Turns(settings, scheduler or SchedulerSettings(), self._fleet)
        self._sequences: dict[RequestId, SequenceEntry] = {}
        self._num_arrived = 0
        self._wake_at_s = math.inf
        self._actions: list[AnyDispatchAction] = []
        self._now = 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences under way or waiting."""
        return len(self._sequences)

    def epoch_of(self, request_id: RequestId) -> Epoch | None:
        """Return the attempt in which a sequence is under way; None when it is not."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.epoch

    @property
    def turns(self) -> Turns:
        """Who waits, what was asked and served lately, and what was learned from it."""
        return self._turns

    @property
    def instances(self) -> tuple[InstanceEntry, ...]:
        """All configured instances with their loads, in the order of configuration. Not to be changed."""
        return self._fleet.entries

    @property
    def fleet_version(self) -> int:
        """See ``Fleet.version``."""
        return self._fleet.version

    def compared(self, one: SequenceArrived | RequestId) -> list[InstanceEntry]:
        """See ``Turns.compared``, of a sequence that arrives or one that is offered."""
        if not isinstance(one, SequenceArrived):
            found = self._sequences.get(one)
        elif matters_who_decodes(self._fleet, has_prefix=bool(one.block_hashes)):
            found = SequenceEntry.arrived(one, 0, 0, 0)
        else:
            return []
        return [] if found is None else self._turns.compared(found, self._held(found))

    def handle(self, event: AnyDispatchEvent, now: float) -> list[AnyDispatchAction]:
        """Take one event at time ``now`` (seconds) and return what is to be done, in order.

        Raise InternalError, with the sequence's story, on an event that cannot happen in the sequence's state. The
        dispatcher stays usable: nothing of that sequence was changed.
        """
        self._actions = []
        self._now = now
        _TAKEN_BY[type(event)](self, event)
        return self._actions

    def _on_up(self, event: InstanceUp) -> None:
        self._fleet.up(event)
        self._place_waiting()

    def _on_down(self, event: InstanceDown) -> None:
        self._down(event.instance, InstanceState.LOST if event.returning else InstanceState.GONE, event.detail)

    def _on_lesson(self, event: ProcessStarting | Join | CostsKnown | LinkKnown | ForeignLoadKnown) -> None:
        self._fleet.take(event)

    def _on_drain(self, event: Drain) -> None:
        if self._fleet.drain(event.instance):
            self._actions.append(Drained(instance=event.instance))
        self._place_waiting()

    def _on_undrain(self, event: Undrain) -> None:
        self._fleet.undrain(event.instance)
        self._place_waiting()

    def _on_leave(self, event: Leave) -> None:
        self._down(event.instance, InstanceState.GONE, "it was removed")
        self._fleet.remove(event.instance)

    def _on_role(self, event: ChangeRole) -> None:
        self._place_waiting(self._fleet.change_role(event.instance, event.role))

    # Sequences ------------------------------------------------------------------------------------------------

    def _on_arrived(self, event: SequenceArrived) -> None:
        if event.request_id in self._sequences:
            raise InternalError(f"sequence {event.request_id} was submitted twice")
        sequence = SequenceEntry.arrived(event, self._num_arrived, self._now, self._settings.request_timeout_s)
        if self._turns.is_judged(sequence):
            sequence.held = self._held(sequence)  # to predict it before its turn has come
        verdict = self._turns.take(sequence, len(self._sequences), self._now)
        if verdict is not None:
            self._actions.append(verdict)
        if isinstance(verdict, Refuse):
            return
        self._num_arrived += 1
        self._sequences[event.request_id] = sequence
        self._wake(sequence.deadline_s)
        self._place_queued()

    def _place(self, sequence: SequenceEntry) -> None:
        """Give a sequence that nobody holds to an instance, let it wait for one, or fail it when none will do."""
        if sequence.lease and not self._adopt(sequence) and is_only_with_visited(self._fleet, sequence):
            self._end_lease(sequence)
            self._resume(sequence, "only instances that held it can go on with it")
        if sequence.holder or (not sequence.lease and self._start(sequence)):
            return
        why = why_unplaceable(self._fleet, sequence, strict_roles=self._settings.has_walls)
        if why is not None:
            self._fail(sequence, *why)
        else:
            sequence.wait_until_s = min(sequence.wait_until_s, self._now + self._settings.instance_wait_s)
            self._wake(sequence.wait_until_s)

    def _start(self, sequence: SequenceEntry) -> bool:
        """Give a queued sequence to an instance, or hold it back; return False when none can take it now."""
        sequence.held = self._held(sequence)
        start = self._turns.start(sequence, self._now)
        if start is None:
            return False
        sequence.wait_until_s = math.inf
        if isinstance(start, HeldBack):
            self._wake(start.until_s)
            return True
        instance = start.instance
        sequence.visited.add(instance.instance)
        lender = choose_lender(lenders(self._fleet, sequence), sequence, instance)
        num_new = num_to_compute(sequence, instance, lender)
        self._fleet.charge(sequence, instance.instance, Charge(prefill_tokens=num_new), self._now)
        if start.chosen is not None:
            self._actions.append(path_chosen(sequence, self._now))
        state = Whereabouts.PREFILLING if start.hands_over else Whereabouts.RUNNING
        if lender is None:
            self._actions.append(borrowing.start(sequence, state, self._now))
        else:
            self._fleet.charge(sequence, lender.instance, Charge(), self._now)
            self._actions.append(borrowing.borrow(sequence, lender.instance, state, self._now))
        return True

    def _held(self, sequence: SequenceEntry) -> Mapping[InstanceId, HeldPrefix]:
        return held_prefixes(self._prefixes, sequence, self._settings.cache_routing)

    def _lent(self, sequence: SequenceEntry, *, has_lent: bool) -> None:
        """Let a sequence that borrows start, with what was lent or without."""
        if not has_lent:
            self._end_lease(sequence)
        self._actions.append(borrowing.answered(sequence, self._now, has_lent=has_lent))

    def _on_part(self, event: PartMade) -> None:
        """Choose who goes on with a sequence while it is being prefilled, and let that one read what is there."""
        sequence = self._held_by(event.instance, event.request_id, event.epoch)
        if sequence is not None and (part := self._turns.read_early(sequence, event, self._now)) is not None:
            self._actions.append(part)

    def _adopt(self, sequence: SequenceEntry) -> bool:
        """Give an offered sequence to a decode instance; return False when none can take it now."""
        sequence.held = self._held(sequence)
        instance = self._turns.adopter(sequence, self._now)
        if instance is not None and instance.instance == sequence.reader:
            sequence.reader = None  # it goes on with what it has read
        self._actions += send_reader_away(self._fleet, sequence, self._now)
        if instance is None:
            return False
        name = instance.instance
        sequence.move(Whereabouts.PULLING, self._now, f"adopted by {name}")
        sequence.hold(name)
        self._fleet.charge(sequence, name, Charge(kv_tokens=sequence.num_tokens, is_decoding=True), self._now)
        self._actions.append(
            SendAdopt(
                request_id=sequence.request_id,
                epoch=sequence.epoch,
                instance=name,
                answer_age_s=max(0.0, self._now - sequence.first_token_s),
                num_later_tokens=max(0, sequence.num_answer_tokens - 1),
            )
        )
        return True

    def _on_tokens(self, event: TokensEmitted) -> None:
        self._fleet.set_untold(event.instance, event.num_untold)
        current: list[tuple[SequenceEntry, Progress]] = []
        for progress in event.progress:
            sequence = self._held_by(event.instance, progress.request_id, progress.epoch)
            if sequence is not None:
                if sequence.state is Whereabouts.OFFERING:
                    sequence.refuse_event(f"more tokens from {event.instance}")
                current.append((sequence, progress))
        for sequence, progress in current:  # all or none: tokens that are counted here are delivered
            self._advance(sequence, event.instance, progress)
        if current:
            self._actions.append(Deliver(request_ids=tuple([progress.request_id for _, progress in current])))
        for sequence, progress in current:
            if progress.finished:
                if (ended := path_ended(sequence)) is not None:
                    self._actions.append(ended)
                self._turns.finished(sequence)
                self._finish(sequence, "finished")
        self._place_queued()

    def _advance(self, sequence: SequenceEntry, instance: InstanceId, progress: Progress) -> None:
        sequence.num_tokens += progress.num_tokens
        if progress.num_tokens == 0:
            return
        if sequence.state is Whereabouts.PREFILLING and not progress.finished:
            sequence.move(Whereabouts.OFFERING, self._now, f"first token from {instance}")
        self._turns.note_tokens(sequence, progress.num_tokens, self._now)
        self._fleet.came_on(sequence, instance, self._now)

    def _on_offer(self, event: OfferMade) -> None:
        borrower = self._sequences.get(event.request_id)
        if borrower is not None and borrowing.waits_for(borrower, event):
            self._lent(borrower, has_lent=True)
            return
        sequence = self._held_by(event.instance, event.request_id, event.epoch)
        if sequence is None:
            # It was cancelled while the offer was on its way: nobody will read these blocks.
            self._release(event.request_id, event.epoch, event.instance)
            return
        sequence.move(Whereabouts.OFFERED, self._now, f"offered by {event.instance}")
        sequence.holder = None
        sequence.lease = event.instance
        self._place(sequence)

    def _on_nothing_lent(self, event: NothingLent) -> None:
        borrower = self._sequences.get(event.request_id)
        if borrower is not None and borrowing.waits_for(borrower, event):
            self._lent(borrower, has_lent=False)

    def _on_pulled(self, event: PullEnded) -> None:
        sequence = self._held_by(event.instance, event.request_id, event.epoch)
        if sequence is None:
            return
        if sequence.state is not Whereabouts.PULLING:
            sequence.refuse_event(f"a pull by {event.instance}")
        state, sequence.borrows_for = sequence.borrows_for or Whereabouts.DECODING, None
        sequence.move(state, self._now, f"pulled by {event.instance}")
        if state is Whereabouts.DECODING and event.duration_s is not None:
            self._turns.note_hand_over(sequence, event.duration_s)
        self._end_lease(sequence)
        self._move_away()

    def _on_failed(self, event: SequenceFailed) -> None:
        sequence = self._held_by(event.instance, event.request_id, event.epoch)
        if sequence is None:
            return
        sequence.holder = None
        self._fail(sequence, FailReason(event.kind.value), event.detail)
        self._place_queued()

    def _on_cancelled(self, event: SequenceCancelled) -> None:
        sequence = self._sequences.get(event.request_id)
        if sequence is not None and sequence.epoch >= event.epoch:
            self._abort(sequence)
            self._finish(sequence, "cancelled")
            self._place_queued()

    # Instances ------------------------------------------------------------------------------------------------

    def _move_away(self, flipped: InstanceEntry | None = None) -> None:
        """Let running answers go on elsewhere whose instances give them away, as far as others can take them now."""
        for sequence in movable(self._fleet, self._sequences.values(), flipped):
            source, how = sequence.holder, self._turns.choose_move(sequence, self._now)
            assert source is not None, "a running sequence is somewhere"
            if how is Move.PULL:
                self._actions.append(migrate(sequence, source, self._now))
            elif how is Move.RECOMPUTE:
                self._abort(sequence)
                sequence.holder = None
                self._discharge(sequence, source)
                self._resume(sequence, f"{source} gives it away")
                self._place_queued()

    def _down(self, instance: InstanceId, state: InstanceState, detail: str) -> None:
        if self._fleet.lose(instance, state):
            for other in self.instances:
                if other.is_alive:
                    self._actions.append(SendPeerLost(instance=other.instance, lost=instance))
            for sequence in list(self._sequences.values()):
                self._lose(sequence, instance, detail)
        self._place_waiting()

    def _place_queued(self) -> None:
        """Give those whose turn it is to instances. Who does not start keeps back only who wait with it."""
        passed: set[RequestId] = set()
        while (sequence := self._turns.next(passed)) is not None:
            self._place(sequence)
            if sequence.state is Whereabouts.QUEUED:
                if not (others := self._turns.passed_over(sequence)):
                    return
                passed.update(others)

    def _place_waiting(self, flipped: InstanceEntry | None = None) -> None:
        """The instances have changed: give those that nobody holds to one, or fail them, and move what is to move."""
        for sequence in [one for one in self._sequences.values() if one.state is Whereabouts.OFFERED]:
            self._place(sequence)
        self._place_queued()
        self._move_away(flipped)

    def _lose(self, sequence: SequenceEntry, lost: InstanceId, why: str) -> None:
        """Settle what the death of an instance means for one sequence."""
        if sequence.reader == lost:
            sequence.reader = None
            self._discharge(sequence, lost)
        if sequence.lease == lost:
            sequence.lease = None
            self._discharge(sequence, lost)
            if sequence.state is Whereabouts.BORROWING:
                self._lent(sequence, has_lent=False)
                return
            if sequence.holder is not None:
                sequence.story.append((self._now, f"{lost} died while its blocks were being pulled", sequence.state))
                return
        elif sequence.holder == lost:
            sequence.holder = None
            self._discharge(sequence, lost)
            self._end_lease(sequence)
        else:
            return
        if sequence.state is Whereabouts.BORROWING:
            self._resume(sequence, f"{lost}, which was to compute it, died: {why}")
            return
        sequence.note_loss(lost, self._now, why)
        if len(sequence.losses) < self._settings.max_instance_losses:
            self._resume(sequence, f"{lost} died: {why}")
            return
        self._fail(sequence, FailReason.INSTANCE_LOST, sequence.loss_story)

    def _resume(self, sequence: SequenceEntry, why: str) -> None:
        """Let a sequence that is on no instance any more start again, in a new epoch, once it is placed."""
        self._actions += send_reader_away(self._fleet, sequence, self._now)
        sequence.move(Whereabouts.QUEUED, self._now, why)
        sequence.borrows_for = None
        sequence.begin_attempt()
        self._turns.start_again(sequence)
        self._actions.append(Resume(request_id=sequence.request_id, epoch=sequence.epoch, why=why))

    def _on_tick(self, event: Tick) -> None:
        self._wake_at_s = math.inf
        for sequence in list(self._sequences.values()):
            if (why := why_over(self._fleet, sequence, self._settings, self._now)) is not None:
                self._abort(sequence)  # one that waits for an instance is on none
                self._fail(sequence, *why)
            else:
                self._wake(min(sequence.deadline_s, sequence.wait_until_s))
        self._place_queued()

    # Steps shared by several events ---------------------------------------------------------------------------

    def _held_by(self, instance: InstanceId, request_id: RequestId, epoch: Epoch) -> SequenceEntry | None:
        """Return the sequence if ``instance`` holds it in this epoch; else note that the event is out of date."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.epoch != epoch or sequence.holder != instance:
            self._actions.append(Drop(request_id=request_id, epoch=epoch, instance=instance))
            return None
        return sequence

    def _wake(self, time_s: float) -> None:
        """Ask for a Tick at ``time_s`` unless an earlier one is asked for already."""
        if time_s < self._wake_at_s:
            self._wake_at_s = time_s
            self._actions.append(WakeAt(time_s=time_s))

    def _abort(self, sequence: SequenceEntry) -> None:
        if sequence.holder is not None:
            self._actions.append(
                SendAbort(request_id=sequence.request_id, epoch=sequence.epoch, instance=sequence.holder)
            )

    def _fail(self, sequence: SequenceEntry, reason: FailReason, detail: str) -> None:
        self._end(sequence, reason.value)
        self._actions.append(Fail(request_id=sequence.request_id, epoch=sequence.epoch, reason=reason, detail=detail))

    def _finish(self, sequence: SequenceEntry, why: str) -> None:
        self._end(sequence, why)
        self._actions.append(Finish(request_id=sequence.request_id, epoch=sequence.epoch))

    def _end(self, sequence: SequenceEntry, why: str) -> None:
        self._turns.leave(sequence)
        self._actions += send_reader_away(self._fleet, sequence, self._now)
        sequence.move(Whereabouts.ENDED, self._now, why)
        self._end_lease(sequence)
        sequence.holder = None
        for instance in list(sequence.charges):
            self._discharge(sequence, instance)
        del self._sequences[sequence.request_id]

    def _end_lease(self, sequence: SequenceEntry) -> None:
        if sequence.lease is not None:
            self._release(sequence.request_id, sequence.epoch, sequence.lease)
            self._discharge(sequence, sequence.lease)
            sequence.lease = None

    def _release(self, request_id: RequestId, epoch: Epoch, instance: InstanceId) -> None:
        if self._fleet.entry(instance).is_alive:
            self._actions.append(SendRelease(request_id=request_id, epoch=epoch, instance=instance))

    def _discharge(self, sequence: SequenceEntry, instance: InstanceId) -> None:
        if self._fleet.discharge(sequence, instance, self._now):
            self._actions.append(Drained(instance=instance))

    def validate(self) -> None:
        """Raise InternalError unless every sequence is where its state says and the loads add up."""
        for sequence in self._sequences.values():
            sequence.validate()
        self._fleet.validate(self._sequences.values())


_TAKEN_BY: Final = by_type(AnyDispatchEvent, Dispatcher, "_on_")
