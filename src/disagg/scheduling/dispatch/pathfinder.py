"""Which instance a sequence is given to, and when: by predicted latency, or by loads in tokens within strict roles.

By predictions, an instance is given prompts ahead of its work up to ``AHEAD_S``. The others wait in the router, and
are given to whoever is predicted best when their turn comes.
"""

from typing import Final

import msgspec

from disagg.base.config import MAX_OVERTAKE_S, RouterSettings, SchedulerSettings
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.scheduling.by_objectives import queue_order
from disagg.scheduling.dispatch.admission import DrainRate, Miss, expected_rate, expected_ttft_s, judge
from disagg.scheduling.dispatch.candidates import FEW, candidates
from disagg.scheduling.dispatch.choice import choose_adopter, choose_start, open_to
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.fleet_facts import FleetFacts
from disagg.scheduling.dispatch.forecast import Forecast
from disagg.scheduling.dispatch.forecaster import Forecaster, PromptDemand
from disagg.scheduling.dispatch.guests import Guests
from disagg.scheduling.dispatch.margins import BEHIND_PROMPTS, FOR_GUESTS, OF_GUESTS, Margins
from disagg.scheduling.dispatch.paths import GOOD_ENOUGH, Wanted, best_path, forecast_paths
from disagg.scheduling.dispatch.prefixes import choose_lender, lenders, num_to_compute
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry
from disagg.scheduling.dispatch.waiting_room import WaitingRoom
from disagg.scheduling.queue_order import rank_of
from disagg.scheduling.recent_work import RecentWork

AHEAD_S: Final = 0.25
"""Seconds of prefill that an instance has at hand, so that it never waits for the router."""
_SHORTEST_WAIT_S: Final = 1e-3
_FACTS_FOR_S: Final = 0.05


class Placed(msgspec.Struct, frozen=True):
    """Where a sequence starts; by predictions with those of the path, and of the best other one."""

    instance: InstanceEntry
    hands_over: bool
    chosen: Forecast | None = None
    other: Forecast | None = None


class HeldBack(msgspec.Struct, frozen=True):
    """The sequence's best instance has enough to do: look again at ``until_s``, or when it has done something."""

    until_s: float
    for_guests: bool = False
    """Others may go first: it is their room that is kept."""


class Pathfinder:
    """Chooses among the instances of a fleet. ``scheduler`` is what all of those are told, ``room`` who waits."""

    def __init__(self, settings: RouterSettings, scheduler: SchedulerSettings, room: WaitingRoom) -> None:
        self.predicts = settings.predicts
        self.experience = Experience()
        self._strict_roles = settings.has_walls
        self._append_turns = settings.append_turns
        self._objectives = scheduler.objectives
        self._order = queue_order(scheduler.queue, scheduler.objectives)
        self._drain = DrainRate()
        self._margins = Margins()
        self._guests = Guests()
        self._facts: tuple[int, float, FleetFacts] | None = None
        """Of which version of the fleet, until when, and what."""
        self._room = room
        self._arrivals = RecentWork()
        """Tokens of prompts that came."""

    def objectives_of(self, sequence: SequenceEntry) -> Objectives:
        """Return what a sequence's latencies ought to be."""
        return sequence.objectives.or_else(self._objectives)

    def rank_of(self, sequence: SequenceEntry) -> tuple[int, float, int]:
        """Return the place of a sequence among those that wait."""
        priority, rank_s = rank_of(
            self._order,
            priority=sequence.priority,
            arrival_s=sequence.arrived_s,
            num_tokens=sequence.num_tokens,
            ttft_s=self.objectives_of(sequence).ttft_s,
        )
        return (priority, rank_s, sequence.order)

    def note_arrival(self, sequence: SequenceEntry, now: float) -> None:
        """Take account of a sequence that was not refused."""
        self._arrivals.add(sequence.num_tokens, now)

    def miss(self, fleet: Fleet, sequence: SequenceEntry, now: float) -> Miss | None:
        """Return why a sequence that arrives is predicted to miss its objectives; None when nothing says so."""
        forecaster = self.forecaster(fleet, now)
        forecasts, wanted = self._forecasts(fleet, sequence, forecaster)
        best = best_path(forecasts, wanted)
        if best is None:
            return None
        expected = expected_rate(fleet.entries, forecaster, sequence.num_tokens, has_walls=self._strict_roles)
        rate, margin = self._drain.rate(expected), self._margins.margin
        ahead = tuple(self._room.ahead_of(sequence))
        if not self._presses(sequence, now) and (not ahead or self._room.somebody_presses()):
            rate = max(rate, expected)  # what is held back for it does not keep it waiting
            is_free = self._room.somebody_presses() or not fleet.entry(best.path.prefill).num_prefills
            margin = OF_GUESTS if is_free else BEHIND_PROMPTS
        ttft_s = now - sequence.arrived_s + expected_ttft_s(best, forecaster, ahead, rate)
        sequence.promised_ttft_s = ttft_s
        return judge(sequence, best, forecaster, ttft_s, wanted.objectives, margin)

    def note_admitted(self, sequence: SequenceEntry, now: float) -> None:
        """Take account of a sequence that is predicted to keep its objectives, before it is under way."""
        if sequence.promised_ttft_s is not None and not self._presses(sequence, now):
            self._guests.admitted(sequence, now)

    def note_first_token(self, sequence: SequenceEntry, now: float) -> None:
        """Learn from when it came how far predictions are off."""
        ttft_s = self.objectives_of(sequence).ttft_s
        if sequence.promised_ttft_s is not None and ttft_s is not None and not sequence.is_resumed:
            self._margins.first_token(sequence.promised_ttft_s, now - sequence.arrived_s, ttft_s)

    def note_end(self, sequence: SequenceEntry) -> None:
        """Learn from an answer whether too many are decoded at once."""
        objective_s, tpot_s = self.objectives_of(sequence).tpot_s, sequence.tpot_s
        if sequence.promised_ttft_s is None or sequence.is_resumed or objective_s is None or tpot_s is None:
            return
        if not sequence.is_best_effort:
            self._margins.answer_ended(sequence.arrived_s, sequence.last_token_s, is_kept=tpot_s <= objective_s)

    def _presses(self, sequence: SequenceEntry, now: float) -> bool:
        guest = self._guests.expected(sequence, now)
        comes = guest is not None and not self._room.num_under_way(guest.tenant)
        return self._room.presses(sequence.tenant, beside_guest=comes)

    def _keeps_guests_out(self, fleet: Fleet, sequence: SequenceEntry, forecaster: Forecaster) -> bool:
        """Return whether a guest would be refused beside the sequence."""
        now = forecaster.now
        guest = self._guests.expected(sequence, now)
        if guest is None or not self._presses(sequence, now):
            return False
        if self._room.num_here(sequence.tenant) == len(self._room.waiting_of(sequence.tenant)):
            return False  # of its own nothing is being served
        guest.rank = self.rank_of(guest)
        forecasts, wanted = self._forecasts(fleet, guest, forecaster)
        best = best_path(forecasts, wanted)
        if best is None:
            return False
        return judge(guest, best, forecaster, best.ttft_s, wanted.objectives, FOR_GUESTS) is not None

    def start(self, fleet: Fleet, sequence: SequenceEntry, now: float) -> Placed | HeldBack | None:
        """Return where a queued sequence starts, or that it is held back; None when no instance can take it now."""
        if not self.predicts:
            instance = choose_start(fleet, sequence, append_turns=self._append_turns)
            return None if instance is None else Placed(instance, instance.role is Role.PREFILL)
        forecaster = self.forecaster(fleet, now)
        forecasts, wanted = self._forecasts(fleet, sequence, forecaster)
        chosen = best_path(forecasts, wanted)
        if chosen is None:
            return None
        instance = fleet.entry(chosen.path.prefill)
        ahead_s = forecaster.ahead_s(instance, sequence)
        if ahead_s > AHEAD_S:
            return HeldBack(now + max(ahead_s - AHEAD_S, _SHORTEST_WAIT_S))
        if self._is_in_the_way(sequence, chosen, now):
            return HeldBack(sequence.arrived_s + MAX_OVERTAKE_S)
        must_go_s = self._must_go_s(sequence, chosen)
        if now < must_go_s and self._keeps_guests_out(fleet, sequence, forecaster):
            return HeldBack(must_go_s, for_guests=True)
        other = best_path((one for one in forecasts if one is not chosen), wanted)
        return Placed(instance, chosen.path.hands_over, chosen, other)

    def _must_go_s(self, sequence: SequenceEntry, chosen: Forecast) -> float:
        """Return until when a sequence may be held back for who is not there: it was promised its own objective."""
        until_s, ttft_s = sequence.arrived_s + MAX_OVERTAKE_S, self.objectives_of(sequence).ttft_s
        if ttft_s is None or sequence.is_best_effort:
            return until_s
        return min(until_s, sequence.arrived_s + GOOD_ENOUGH * ttft_s - chosen.ttft_s)

    def note_start(self, fleet: Fleet, start: Placed, sequence: SequenceEntry, now: float) -> None:
        """Take account of a sequence that was given to an instance, and of who waits on."""
        if not self.predicts:
            return
        work_s = self.forecaster(fleet, now).prompt_s(sequence.num_tokens)
        start.instance.prefill_work.add(work_s, now)
        self._drain.note(now, somebody_waits=len(self._room) > 0, started_s=work_s)

    def note_held_back(self, now: float) -> None:
        """Take account of somebody who waits on."""
        self._drain.note(now, somebody_waits=True)

    def adopt(self, fleet: Fleet, sequence: SequenceEntry, now: float) -> InstanceEntry | None:
        """Return the decode instance that goes on with an offered sequence; None when none can take it now."""
        if not self.predicts:
            return choose_adopter(fleet, sequence)
        forecaster = self.forecaster(fleet, now)
        others = candidates(fleet, sequence, but=sequence.visited)
        decode, colocated = (open_to(others, sequence, role, hand_over=False) for role in (Role.DECODE, Role.COLOCATED))
        return min(
            decode or colocated,
            key=lambda entry: forecaster.handed_over_token_s(entry, sequence, sequence.kv_source),
            default=None,
        )

    def _forecasts(
        self, fleet: Fleet, sequence: SequenceEntry, forecaster: Forecaster
    ) -> tuple[list[Forecast], Wanted]:
        # A sequence that lost an instance need not wait for one of the right role.
        strict_roles = self._strict_roles and not sequence.is_resumed
        holders = lenders(fleet, sequence)

        def cached(entry: InstanceEntry, sequence: SequenceEntry) -> int:
            if not sequence.held:
                return 0
            return sequence.num_tokens - num_to_compute(sequence, entry, choose_lender(holders, sequence, entry))

        forecasts = forecast_paths(
            candidates(fleet, sequence),
            sequence,
            forecaster,
            strict_roles=strict_roles,
            cached=cached,
            append_turns=self._append_turns,
        )
        wanted = Wanted(
            self.objectives_of(sequence),
            self._objectives,
            forecaster.num_answer_tokens(sequence),
            waited_s=forecaster.now - sequence.arrived_s,
        )
        return forecasts, wanted

    def _is_in_the_way(self, sequence: SequenceEntry, chosen: Forecast, now: float) -> bool:
        """Return whether a sequence that is served when others leave time would make them late; not for ever."""
        if not sequence.is_best_effort or now >= sequence.arrived_s + MAX_OVERTAKE_S:
            return False
        tpot_s = self._objectives.tpot_s
        return tpot_s is not None and chosen.others_tpot_s > tpot_s

    def forecaster(self, fleet: Fleet, now: float) -> Forecaster:
        """Return what predicts for the instances as they are now."""
        demand = PromptDemand(self._room.num_tokens, self._arrivals.share(now))
        return Forecaster(self._facts_of(fleet, now), self.experience, self._objectives, now, demand)

    def _facts_of(self, fleet: Fleet, now: float) -> FleetFacts:
        """Return what is known of all instances: of many as it was a moment ago, as it changes slowly."""
        known = self._facts
        if known is not None and len(fleet.entries) > FEW and known[0] == fleet.version and now < known[1]:
            return known[2]
        facts = FleetFacts.of(fleet.entries, now)
        self._facts = (fleet.version, now + _FACTS_FOR_S, facts)
        return facts
