"""When an instance reports its load."""

from dataclasses import dataclass, field

import pytest

from disagg.base.ids import InstanceId, RouterId
from disagg.base.message_fields import Message
from disagg.base.messages import InstanceLoad, LoadReport
from disagg.base.router_messages import ForeignLoad
from disagg.engine.load_reporter import LoadReporter

IDLE = InstanceLoad()
BUSY = InstanceLoad(num_running=1)


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
    reporter.update(lambda: IDLE, foreign, 10.0)
    return reporter


def test_the_first_report_is_sent_at_once(reporter: LoadReporter, sent: Sent) -> None:
    assert sent.messages == [LoadReport(instance=InstanceId("a"), incarnation="0b", load=IDLE)]


def test_a_change_is_reported_but_not_more_often_than_every_50_ms(reporter: LoadReporter, sent: Sent) -> None:
    reporter.update(lambda: BUSY, foreign, 10.01)
    assert len(sent.messages) == 1
    assert reporter.due_s == pytest.approx(10.05)
    reporter.update(lambda: BUSY, foreign, 10.05)
    assert [message.load for message in sent.messages if isinstance(message, LoadReport)] == [IDLE, BUSY]


def test_without_a_change_there_is_a_sign_of_life_every_second(reporter: LoadReporter, sent: Sent) -> None:
    assert reporter.due_s == pytest.approx(11.0)
    reporter.update(lambda: IDLE, foreign, 10.99)
    assert len(sent.messages) == 1
    reporter.update(lambda: IDLE, foreign, 11.0)
    assert len(sent.messages) == 2


def test_a_change_that_is_taken_back_in_time_is_no_news(reporter: LoadReporter, sent: Sent) -> None:
    reporter.update(lambda: BUSY, foreign, 10.01)
    reporter.update(lambda: IDLE, foreign, 10.06)
    assert len(sent.messages) == 1


def test_each_of_several_routers_hears_what_is_not_its_own(reporter: LoadReporter, sent: Sent) -> None:
    sent.routers = (RouterId(""), RouterId("0.1"))
    reporter.report_soon()
    reporter.update(lambda: IDLE, foreign, 10.06)
    assert [message.foreign.num_sequences for message in sent.messages if isinstance(message, LoadReport)] == [0, 0, 3]
