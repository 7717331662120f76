"""Whose paths are forecast: of a large fleet few, and the right ones."""

from heapq import nsmallest

import pytest

from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import Role
from disagg.cache.prefix_index import HeldPrefix
from disagg.scheduling.dispatch.candidates import FEW, candidates
from disagg.scheduling.dispatch.events import InstanceUp, SequenceArrived
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.load_index import decode_load, prefill_load
from disagg.scheduling.dispatch.state import Charge, InstanceEntry, SequenceEntry

CAPACITY = 1000


def arrived(name: str = "asked", num_tokens: int = 100, more: int = 100) -> SequenceEntry:
    event = SequenceArrived(
        request_id=RequestId(name), epoch=Epoch(0), num_tokens=num_tokens, max_total_tokens=num_tokens + more
    )
    return SequenceEntry.arrived(event, 0, 0.0, 600.0)


def fleet_of(num_each: int, capacity: int = CAPACITY) -> Fleet:
    """Return prefill and decode instances in turn, each with more load than the one before."""
    roles = [role for _ in range(num_each) for role in (Role.PREFILL, Role.DECODE)]
    fleet = Fleet({InstanceId(f"{role.value}-{number // 2}"): role for number, role in enumerate(roles)})
    for number, entry in enumerate(fleet.entries):
        fleet.up(InstanceUp(instance=entry.instance, max_total_tokens=capacity))
        fleet.charge(arrived(f"s{number}"), entry.instance, Charge(10 * number, 10 * number), 0.0)
    return fleet


def names(entries: list[InstanceEntry]) -> list[str]:
    return [entry.instance for entry in entries]


def test_all_instances_of_a_small_fleet_are_candidates() -> None:
    fleet = fleet_of(FEW // 2)
    assert candidates(fleet, arrived()) == fleet.entries
    left_out = fleet.entries[3].instance
    assert left_out not in names(candidates(fleet, arrived(), but=[left_out]))


@pytest.mark.parametrize("num_each", [FEW, 40])
def test_of_a_large_fleet_they_are_the_least_loaded_of_each_role(num_each: int) -> None:
    fleet = fleet_of(num_each)
    found = candidates(fleet, arrived())
    for role, load in ((Role.PREFILL, prefill_load), (Role.DECODE, decode_load)):
        own = [entry for entry in fleet.entries if entry.role is role]
        assert [entry for entry in found if entry.role is role] == nsmallest(4, own, key=load)


def test_who_holds_the_beginning_of_a_sequence_is_one_however_loaded() -> None:
    fleet = fleet_of(FEW)
    sequence = arrived()
    holder = InstanceId(f"decode-{FEW - 1}")
    sequence.held = {holder: HeldPrefix(64, 64)}
    assert holder in names(candidates(fleet, sequence))
    assert holder not in names(candidates(fleet, sequence, but=[holder]))


def test_who_cannot_hold_the_answer_takes_no_place_of_one_who_can() -> None:
    fleet = fleet_of(FEW, capacity=150)
    last = fleet.entries[-1]
    last.capacity = CAPACITY
    found = candidates(fleet, arrived(num_tokens=100, more=100))
    assert [entry for entry in found if entry.role is Role.DECODE] == [last]
    assert len([entry for entry in found if entry.role is Role.PREFILL]) == 4
