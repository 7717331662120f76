"""When an instance reports its load."""

from dataclasses import dataclass, field

import pytest

from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Message
from disagg.base.messages import InstanceLoad, LoadReport
from disagg.base.router_messages import ForeignLoad
from disagg.engine.load_reporter import LoadReporter
from disagg.scheduling.step.statistics import Occupancy


@dataclass
class Counted:
    """Stands where the core is."""

    counted: InstanceLoad

    @property
    def occupancy(self) -> Occupancy:
        return Occupancy(self.counted.num_running, self.counted.num_waiting, self.counted.num_leases)

    def load(self) -> InstanceLoad:
        return self.counted

    def load_of_others(self, router: RouterId) -> ForeignLoad:
        return foreign(router)


IDLE = Counted(InstanceLoad())
BUSY = Counted(InstanceLoad(num_running=1))
FURTHER = Counted(InstanceLoad(num_running=1, num_steps_total=1))


@dataclass
class Sent:
    """Stands where the control channel is."""

    messages: list[Message] = field(default_factory=list)
    routers: tuple[RouterId, ...] = ()

    def send(self, message: Message) -> None:
        self.messages.append(message)

    def send_to(self, router: RouterId, message: Message) -> None:
        assert isinstance(message, LoadReport)
        assert message.foreign == foreign(router)
        self.send(message)


def foreign(router: RouterId) -> ForeignLoad:
    return ForeignLoad(num_sequences=len(router))


@pytest.fixture
def sent() -> Sent:
    return Sent()


@pytest.fixture
def reporter(sent: Sent) -> LoadReporter:
    reporter = LoadReporter(InstanceId("a"), "0b", sent)
    reporter.update(IDLE, 10.0)
    return reporter


def test_the_first_report_is_sent_at_once(reporter: LoadReporter, sent: Sent) -> None:
    assert sent.messages == [LoadReport(instance=InstanceId("a"), incarnation="0b", load=IDLE.counted)]


def test_a_change_is_reported_but_not_more_often_than_every_50_ms(reporter: LoadReporter, sent: Sent) -> None:
    reporter.update(BUSY, 10.01)
    assert len(sent.messages) == 1
    assert reporter.due_s == pytest.approx(10.05)
    reporter.update(BUSY, 10.05)
    assert [message.load for message in sent.messages if isinstance(message, LoadReport)] == [
        IDLE.counted,
        BUSY.counted,
    ]


def test_without_a_change_there_is_a_sign_of_life_every_second(reporter: LoadReporter, sent: Sent) -> None:
    assert reporter.due_s == pytest.approx(11.0)
    reporter.update(IDLE, 10.99)
    assert len(sent.messages) == 1
    reporter.update(IDLE, 11.0)
    assert len(sent.messages) == 2


def test_a_change_that_is_taken_back_in_time_is_no_news(reporter: LoadReporter, sent: Sent) -> None:
    reporter.update(BUSY, 10.01)
    reporter.update(IDLE, 10.06)
    assert len(sent.messages) == 1


def test_steps_that_only_go_on_are_told_with_the_sign_of_life(reporter: LoadReporter, sent: Sent) -> None:
    reporter.update(BUSY, 11.0)
    reporter.update(FURTHER, 11.1)
    assert len(sent.messages) == 2
    reporter.update(FURTHER, 12.0)
    assert [message.load for message in sent.messages if isinstance(message, LoadReport)][-1] == FURTHER.counted


def test_each_of_several_routers_hears_what_is_not_its_own(reporter: LoadReporter, sent: Sent) -> None:
    sent.routers = (RouterId(""), RouterId("0.1"))
    reporter.report_soon()
    reporter.update(IDLE, 10.06)
    assert [message.foreign.num_sequences for message in sent.messages if isinstance(message, LoadReport)] == [0, 0, 3]
