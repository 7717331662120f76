"""What admission learns from those that it admitted, and for whom it keeps room."""

import pytest

from disagg.base.ids import Epoch, RequestId
from disagg.base.tenants import TenantSettings
from disagg.scheduling.dispatch.admission import DrainRate
from disagg.scheduling.dispatch.guests import Guests
from disagg.scheduling.dispatch.margins import Margins
from disagg.scheduling.dispatch.state import SequenceEntry
from disagg.scheduling.dispatch.waiting_room import WaitingRoom


def sequence(name: str, tenant: str, num_tokens: int = 100, now: float = 0.0, priority: int = 0) -> SequenceEntry:
    return SequenceEntry(
        request_id=RequestId(name),
        epoch=Epoch(1),
        num_tokens=num_tokens,
        max_total_tokens=num_tokens + 10,
        priority=priority,
        order=0,
        arrived_s=now,
        deadline_s=1e9,
        tenant=tenant,
    )


class TestMargins:
    def test_nineteen_in_twenty_of_those_at_the_edge_would_have_kept_theirs(self) -> None:
        margins = Margins()
        factors = [1.0, 1.2, 1.4, 1.6, 1.8]
        for _ in range(40):
            for factor in factors:
                margins.first_token(4.0, 4.0 * factor, 5.0)
        assert 1.7 <= margins.margin.ttft <= 2.1

    def test_sound_predictions_are_trusted_up_to_nine_tenths(self) -> None:
        margins = Margins()
        at_first = margins.margin.ttft
        for _ in range(300):
            margins.first_token(4.0, 4.0, 5.0)
        assert margins.margin.ttft == pytest.approx(1 / 0.9)
        assert at_first > 1 / 0.9

    def test_short_waits_say_little_of_long_ones(self) -> None:
        margins = Margins()
        for _ in range(10):
            margins.first_token(0.01, 0.05, 5.0)
        assert margins.margin.ttft < 1.6

    def test_slow_answers_count_once_until_others_were_admitted_under_the_new_margin(self) -> None:
        margins = Margins()
        for number in range(10):
            margins.answer_ended(arrived_s=float(number), ended_s=20.0 + number, is_kept=False)
        once = margins.margin.tpot
        assert once > 1.0
        margins.answer_ended(arrived_s=25.0, ended_s=30.0, is_kept=False)
        assert margins.margin.tpot > once
        for _ in range(100):
            margins.answer_ended(arrived_s=31.0, ended_s=32.0, is_kept=True)
        assert margins.margin.tpot == 1.0


def test_what_was_expected_of_the_room_fades_once_somebody_waits() -> None:
    drain = DrainRate()
    assert drain.rate(2.0) == 2.0
    for number in range(400):  # half a second of prefill in a second
        drain.note(0.1 * number, somebody_waits=True, started_s=0.05)
    assert drain.rate(2.0) == pytest.approx(0.5, rel=0.05)


class TestGuests:
    def test_a_guest_is_like_the_longest_prompt_of_others_and_is_forgotten(self) -> None:
        guests = Guests()
        guests.admitted(sequence("a", "quiet", 800), 0.0)
        guests.admitted(sequence("b", "quiet", 50, 5.0), 5.0)
        guests.admitted(sequence("c", "flood", 2000, 5.0), 5.0)
        guest = guests.expected(sequence("d", "flood"), 6.0)
        assert guest is not None
        assert (guest.tenant, guest.arrived_s) == ("quiet", 6.0)
        assert 700 < guest.num_tokens <= 800
        assert guest.max_total_tokens == guest.num_tokens + 10
        assert guests.expected(sequence("d", "flood"), 100.0) is None

    def test_nobody_is_his_own_guest(self) -> None:
        guests = Guests()
        guests.admitted(sequence("a", "alone"), 0.0)
        assert guests.expected(sequence("b", "alone"), 1.0) is None

    def test_no_room_is_kept_for_who_is_served_later_anyway(self) -> None:
        guests = Guests()
        guests.admitted(sequence("a", "nightly", priority=10), 0.0)
        assert guests.expected(sequence("b", "search"), 1.0) is None
        assert guests.expected(sequence("b", "batch", priority=10), 1.0) is not None

    def test_names_that_users_invent_are_not_kept_for_ever(self) -> None:
        guests = Guests()
        for number in range(1000):
            guests.admitted(sequence("a", f"user {number}"), 0.0)
        assert len(guests._known) <= 8


class TestPressing:
    def test_who_has_more_than_his_share_presses(self) -> None:
        room = WaitingRoom({"big": TenantSettings(weight=3.0)})
        for number in range(4):
            room.enter(sequence(f"flood{number}", "flood"))
        assert not room.presses("flood", beside_guest=False), "nobody else is there"
        assert room.presses("flood", beside_guest=True)
        room.enter(sequence("one", "quiet"))
        assert room.presses("flood", beside_guest=False)
        assert not room.presses("quiet", beside_guest=False)
        assert room.somebody_presses()

    def test_weights_count_and_one_sequence_never_presses(self) -> None:
        room = WaitingRoom({"big": TenantSettings(weight=3.0)})
        for number in range(3):
            room.enter(sequence(f"big{number}", "big"))
        room.enter(sequence("one", "small"))
        assert not room.presses("big", beside_guest=False)
        assert not room.presses("small", beside_guest=False)
        assert not room.presses("small", beside_guest=True)
