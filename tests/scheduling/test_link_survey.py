"""Measured links: which are, in which order, what is made of the figures, and what dispatch learns from them."""

import pytest
from instance_facts import FACTS
from msgspec import structs

from disagg.base.config import RouterSettings
from disagg.base.ids import InstanceId
from disagg.base.message_fields import PROTOCOL_VERSION
from disagg.base.messages import LinkFigure, LinkMeasured, Ready
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import ChangeRole
from disagg.scheduling.dispatch.experience import Experience
from disagg.scheduling.router.core import RouterCore
from disagg.scheduling.router.header import RouterHeader
from disagg.scheduling.router.inputs import AnyRouterInput, InstanceSaid, MeasureLinks, ProcessExited
from disagg.scheduling.router.outputs import AnyRouterOutput, AskToMeasure, EndInstance, GiveUpInstance, LinkFound

P0, D0, D1 = (InstanceId(name) for name in ("prefill-0", "decode-0", "decode-1"))
ROLES = {P0: Role.PREFILL, D0: Role.DECODE, D1: Role.DECODE}
QUICK = LinkFigure(link="shm", bytes_per_s=8e9, latency_s=1e-5, limit_bytes_per_s=10e9, limit="a copy in memory")
SLOW = LinkFigure(link="tcp", bytes_per_s=5e7, latency_s=1e-3, limit_bytes_per_s=1.25e9, limit="network interface eth0")


class Deployment:
    """A router's core whose instances take requests and answer what a test lets them."""

    def __init__(self, **settings: int) -> None:
        header = RouterHeader(instances=ROLES, settings=RouterSettings(**settings), measures_links=True)  # type: ignore[arg-type]
        self.core = RouterCore(header)
        self.now = 0.0

    def tell(self, one: AnyRouterInput) -> list[AnyRouterOutput]:
        self.now += 1.0
        return self.core.handle(one, self.now)

    def come_up(self, instance: InstanceId, incarnation: str = "1") -> list[tuple[str, str]]:
        facts = structs.replace(FACTS, kv_bytes=160_000, pool=b"here", probe=b"may")
        ready = Ready(
            version=PROTOCOL_VERSION,
            instance=instance,
            incarnation=incarnation,
            role=ROLES[instance],
            facts=facts,
        )
        return asked(self.tell(InstanceSaid(instance=instance, message=ready)))

    def measured(self, target: InstanceId, figure: LinkFigure, source_incarnation: str = "1") -> list[AnyRouterOutput]:
        message = LinkMeasured(
            instance=target, incarnation="1", source=P0, source_incarnation=source_incarnation, figure=figure
        )
        return self.tell(InstanceSaid(instance=target, message=message))


def asked(outputs: list[AnyRouterOutput]) -> list[tuple[str, str]]:
    """Who is to measure its link to whom."""
    return [(one.instance, one.source) for one in outputs if isinstance(one, AskToMeasure)]


def found(outputs: list[AnyRouterOutput]) -> LinkFound:
    (link,) = (one for one in outputs if isinstance(one, LinkFound))
    return link


def test_links_are_measured_one_after_the_other_once_both_ends_take_requests() -> None:
    deployment = Deployment()
    assert deployment.come_up(D0) == []
    assert deployment.come_up(P0) == [(D0, P0)]
    assert deployment.come_up(D1) == []
    outputs = deployment.measured(D0, QUICK)
    assert asked(outputs) == [(D1, P0)]
    assert found(outputs).warning == ""
    assert asked(deployment.measured(D1, QUICK)) == []
    assert [(link.target, link.figure) for link in deployment.core.links] == [(D0, QUICK), (D1, QUICK)]


def test_a_link_far_under_its_hardware_is_a_warning() -> None:
    deployment = Deployment()
    deployment.come_up(P0)
    deployment.come_up(D0)
    link = found(deployment.measured(D0, SLOW))
    assert "47.7MiB/s over tcp is far under the 1.2GiB/s of network interface eth0" in link.warning
    assert link.refusal == ""


def test_below_the_bandwidth_asked_for_the_instance_that_came_last_is_refused_for_good() -> None:
    deployment = Deployment(min_kv_bandwidth_bytes=10**9)
    deployment.come_up(P0)
    deployment.come_up(D0)
    outputs = deployment.measured(D0, SLOW)
    (end,) = (one for one in outputs if isinstance(one, EndInstance))
    assert end.instance == D0
    assert "--min-kv-bandwidth asks for 953.7MiB/s" in end.why
    exited = deployment.tell(ProcessExited(instance=D0, detail="it was ended"))
    assert any(isinstance(one, GiveUpInstance) for one in exited)


def test_a_link_that_cannot_be_read_is_refused_where_bandwidth_is_asked_for() -> None:
    for settings, ends in (({}, False), ({"min_kv_bandwidth_bytes": 1}, True)):
        deployment = Deployment(**settings)
        deployment.come_up(P0)
        deployment.come_up(D0)
        outputs = deployment.measured(D0, LinkFigure(failure="no route"))
        assert "cannot be read: no route" in found(outputs).warning
        assert any(isinstance(one, EndInstance) for one in outputs) is ends


def test_a_death_during_a_measurement_lets_the_next_one_begin_and_old_news_is_dropped() -> None:
    deployment = Deployment()
    for name in (P0, D0, D1):
        deployment.come_up(name)
    assert asked(deployment.tell(ProcessExited(instance=D0, detail="killed"))) == [(D1, P0)]
    deployment.tell(ProcessExited(instance=P0, detail="killed"))
    assert deployment.come_up(P0, incarnation="2") == [(D1, P0)]
    assert not any(isinstance(one, LinkFound) for one in deployment.measured(D1, QUICK, source_incarnation="1"))
    assert found(deployment.measured(D1, QUICK, source_incarnation="2")).figure == QUICK


def test_another_role_and_an_operators_wish_bring_new_measurements() -> None:
    deployment = Deployment()
    for name in (P0, D0, D1):
        deployment.come_up(name)
    deployment.measured(D0, QUICK)
    deployment.measured(D1, QUICK)
    assert asked(deployment.tell(MeasureLinks())) == [(D0, P0)]
    deployment.measured(D0, QUICK)
    assert asked(deployment.measured(D1, QUICK)) == []
    assert asked(deployment.tell(ChangeRole(instance=D0, role=Role.PREFILL))) == [(D1, D0)]


def test_predictions_follow_the_link_and_how_far_hand_overs_were_from_it() -> None:
    experience = Experience()
    assert experience.hand_over_s(1000, link_s=0.5) == pytest.approx(0.5)
    for _ in range(2000):
        experience.hand_over_ended(1000, duration_s=1.0, link_s=0.5)
    assert experience.hand_over_s(1000, link_s=0.5) == pytest.approx(1.0, rel=0.01)
    assert experience.hand_over_s(1000, link_s=5.0) == pytest.approx(10.0, rel=0.01)
