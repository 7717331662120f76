"""What the index of loads finds is what a look at every instance would find, whatever their loads have gone through."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.cache.prefix_index import HeldPrefix
from disagg.scheduling.capacity import most_tokens
from disagg.scheduling.dispatch.choice import choose_adopter, choose_start
from disagg.scheduling.dispatch.events import InstanceUp, SequenceArrived
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.prefixes import BUSY_COST, MIN_LOAN, PULL_COST, holds_most
from disagg.scheduling.dispatch.state import Charge, InstanceEntry, InstanceState, KvLink, SequenceEntry

SMALL, LARGE = 400, 4000


def arrived(name: str, num_tokens: int, more: int) -> SequenceEntry:
    event = SequenceArrived(
        request_id=RequestId(name), epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=num_tokens + more
    )
    return SequenceEntry.arrived(event, 0, 0.0, 600.0)


class Scan:
    """The choices by a look at every instance, written down from the rules and nothing else."""

    def __init__(self, fleet: Fleet, sequence: SequenceEntry, but: tuple[InstanceId, ...] = ()) -> None:
        self.entries = [entry for entry in fleet.entries if entry.instance not in but]
        self.sequence = sequence

    def open_to(self, role: Role) -> list[InstanceEntry]:
        one = self.sequence
        needed = most_tokens(one.num_tokens, one.max_total_tokens, hand_over=role is Role.PREFILL)
        ready = [entry for entry in self.entries if entry.state is InstanceState.READY and entry.role is role]
        return [entry for entry in ready if entry.can_hold(needed)]

    def lent(self, entry: InstanceEntry) -> int:
        held = self.sequence.held.get(entry.instance)
        return 0 if held is None else min(held.num_in_pool, self.sequence.num_tokens - 1)

    def lacking(self, entry: InstanceEntry) -> int:
        return self.sequence.num_tokens - self.sequence.num_cached(entry.instance)

    def start_cost(self, entry: InstanceEntry) -> float:
        cost = entry.prefill_tokens + self.lacking(entry)
        others = [other for other in self.entries if other is not entry and other.is_alive]
        lender = max(others, key=lambda other: (self.lent(other), -other.num_sequences), default=None)
        gain = 0 if lender is None else self.lent(lender) - self.sequence.num_cached(entry.instance)
        return cost if gain < MIN_LOAN else cost - gain * (1 - PULL_COST)

    def least_held(self, entries: list[InstanceEntry]) -> InstanceEntry | None:
        return min(entries, key=lambda one: (one.kv_tokens + self.lacking(one), one.prefill_tokens), default=None)

    def adopter(self) -> InstanceEntry | None:
        self.entries = [entry for entry in self.entries if entry.instance not in self.sequence.visited]
        decode = self.open_to(Role.DECODE)
        least = self.least_held(decode)
        if least is None:
            return self.least_held(self.open_to(Role.COLOCATED))
        far_s = self.travel_s(least)
        near = [entry for entry in decode if 2 * self.travel_s(entry) <= far_s < math.inf]
        nearest = min(near, key=lambda one: (one.kv_tokens, one.prefill_tokens), default=None)
        if far_s < 0.01 or nearest is None:
            return least
        num_tokens = self.sequence.num_tokens
        return nearest if nearest.kv_tokens + num_tokens <= 2 * (least.kv_tokens + num_tokens) else least

    def travel_s(self, entry: InstanceEntry) -> float:
        link = entry.reads.get(self.sequence.lease or InstanceId(""))
        return math.inf if link is None else link.transfer_time_s(self.lacking(entry))

    def append_cost(self, entry: InstanceEntry) -> float:
        return (entry.prefill_tokens + self.lacking(entry)) * (BUSY_COST if entry.num_sequences else 1)

    def start(self, append_turns: bool) -> InstanceEntry | None:
        prefill = min(self.open_to(Role.PREFILL), key=lambda one: (self.start_cost(one), one.kv_tokens), default=None)
        decode = self.least_held(self.open_to(Role.DECODE))
        colocated = min(
            self.open_to(Role.COLOCATED),
            key=lambda one: (self.start_cost(one) + one.kv_tokens, one.kv_tokens),
            default=None,
        )
        first_token = cost = 0.0
        if prefill is not None:
            first_token = cost = self.start_cost(prefill)
            if not self.sequence.ends_at_first_token and decode is None:
                prefill = None
            elif not self.sequence.ends_at_first_token and decode is not None:
                first_token += self.lacking(decode) * PULL_COST
                cost += decode.prefill_tokens + decode.kv_tokens
        if prefill is None:
            return colocated or (decode if self.sequence.is_resumed else None)
        appends = [entry for entry in self.open_to(Role.DECODE) if holds_most(entry, self.sequence)]
        if append_turns and appends:
            append = min(appends, key=self.append_cost)
            if self.append_cost(append) < first_token:
                return append
        if colocated is None:
            return prefill
        return colocated if self.start_cost(colocated) + colocated.kv_tokens < cost else prefill


def random_fleet(rng: random.Random, size: int) -> Fleet:
    fleet = Fleet({InstanceId(f"i{number}"): rng.choice(list(Role)) for number in range(size)})
    for entry in fleet.entries:
        for source in fleet.entries:
            if rng.random() < 0.7:
                entry.reads[source.instance] = KvLink(0.0, rng.choice((1e-6, 1e-4, 2e-4)))
        fleet.up(InstanceUp(instance=entry.instance, max_total_tokens=rng.choice((SMALL, LARGE, LARGE))))
    return fleet


def change(rng: random.Random, fleet: Fleet, sequences: list[SequenceEntry]) -> None:
    """Let one thing happen: a charge that grows, falls or goes, or an instance whose state or role changes."""
    entry, sequence = rng.choice(fleet.entries), rng.choice(sequences)
    what = rng.random()
    if what < 0.02:
        if entry.state is InstanceState.READY:
            fleet.drain(entry.instance)
        else:
            fleet.undrain(entry.instance)
    elif what < 0.04:
        fleet.change_role(entry.instance, rng.choice(list(Role)))
    elif what < 0.3 and entry.instance in sequence.charges:
        fleet.discharge(sequence, entry.instance, 0.0)
    else:
        # Few values, so that loads are often equal.
        charge = Charge(rng.choice((0, 0, 100, 200)), rng.choice((0, 100, 200, 1000)), rng.random() < 0.5)
        fleet.charge(sequence, entry.instance, charge, 0.0)


def question(rng: random.Random, fleet: Fleet) -> SequenceEntry:
    sequence = arrived("asked", rng.choice((100, 300, 1500)), rng.choice((1, 50, 300, 5000)))
    sequence.is_resumed = rng.random() < 0.2
    names = [entry.instance for entry in fleet.entries]
    sequence.lease = rng.choice((None, rng.choice(fleet.entries).instance))
    sequence.visited = set(rng.sample(names, rng.randint(0, min(3, len(names)))))
    if rng.random() < 0.6:
        held = {}
        for name in rng.sample(names, rng.randint(1, len(names))):
            num_tokens = rng.choice((64, 128, 192, 1024, 2048))
            held[name] = HeldPrefix(num_tokens, rng.choice((0, num_tokens // 2, num_tokens)))
        sequence.held = held
    return sequence


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), size=st.integers(1, 12))
def test_every_choice_is_that_of_a_scan(seed: int, size: int) -> None:
    rng = random.Random(seed)
    fleet = random_fleet(rng, size)
    sequences = [arrived(f"s{number}", 100, 100) for number in range(6)]
    for _ in range(25):
        for _ in range(rng.randint(0, 8)):
            change(rng, fleet, sequences)
        fleet.ready.validate()
        sequence = question(rng, fleet)
        assert choose_adopter(fleet, sequence) is Scan(fleet, sequence).adopter()
        but = tuple(sequence.visited)[:1]
        for append_turns in (False, True):
            expected = Scan(fleet, sequence, but).start(append_turns)
            assert choose_start(fleet, sequence, append_turns=append_turns, but=but) is expected


def test_what_is_out_of_date_does_not_pile_up() -> None:
    fleet = random_fleet(random.Random(1), 10)
    sequence = arrived("a", 100, 100)
    target = fleet.entries[0].instance
    fleet.change_role(target, Role.DECODE)
    index = fleet.ready.to_decode
    for _ in range(1000):
        fleet.charge(sequence, target, Charge(kv_tokens=100), 0.0)
        choose_adopter(fleet, arrived("b", 10, 10))
        fleet.charge(sequence, target, Charge(kv_tokens=50), 0.0)
    assert index is fleet.ready.to_decode
    assert index.num_items < 100


def test_a_load_that_falls_unnoticed_is_found() -> None:
    fleet = random_fleet(random.Random(1), 10)
    fleet.charge(arrived("a", 100, 100), fleet.entries[0].instance, Charge(5, 5), 0.0)
    fleet.ready.validate()
    fleet.entries[0].prefill_tokens = fleet.entries[0].kv_tokens = 0
    with pytest.raises(InternalError, match="unnoticed"):
        fleet.ready.validate()
