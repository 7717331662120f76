"""Predictions beside what came, where nothing but the policy's own view can be wrong: steps cost what a line says."""

from collections.abc import Iterator

import pytest
from msgspec import structs
from simulated import cluster_spec, instance, poisson, serve, slack_instances

from disagg.base.config import RouterSettings
from disagg.base.ids import RequestId
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import Overload, ServiceClass
from disagg.costs.latency import StepShape
from disagg.measure.slo import Slo
from disagg.simulator.request import Outcome, SimulatedRequest
from disagg.simulator.simulation import simulate

TTFT_S, TPOT_S = 7.0, 0.029
ROUTER = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, strict_roles=False)


class SmallModelOnOneCore:
    """Beside an answer, a smallest chunk of a prompt does not fit within two TPOT objectives."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        prefill_s = 2.6e-3 * shape.num_prefill_tokens + 2e-3 * shape.num_prefills
        return (0.018 + prefill_s + 1.2e-3 * shape.num_decodes + 2e-6 * shape.decode_context,)


@pytest.mark.parametrize("roles", [(Role.PREFILL, Role.DECODE), (Role.COLOCATED, Role.COLOCATED)])
def test_token_times_are_predicted_where_prompts_hardly_fit_between_tokens(roles: tuple[Role, ...]) -> None:
    instances = slack_instances(roles, SmallModelOnOneCore(), Objectives(ttft_s=TTFT_S, tpot_s=TPOT_S))
    requests = poisson(0.4, 150, seed=5, prompt=(4, 1500))
    report = simulate(cluster_spec(*instances, router=ROUTER), requests, Slo(ttft_s=TTFT_S, tpot_s=TPOT_S))
    assert report.paths is not None
    assert report.paths.tpot_error < 0.15


class ServerCore:
    """A chunk of 512 tokens takes a fifth of a second."""

    num_stages = 1

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        return (0.004 + 4e-4 * shape.num_prefill_tokens + 5e-4 * shape.num_decodes + 2e-7 * shape.decode_context,)


def test_a_tight_class_is_neither_shed_nor_late_for_prompts_that_are_served_after_it() -> None:
    tight, patient = (
        ServiceClass(objectives=Objectives(ttft_s=0.5, tpot_s=0.25), priority=-10, overload=Overload.SHED),
        ServiceClass(objectives=Objectives(ttft_s=30.0, tpot_s=0.5), priority=10, overload=Overload.QUEUE),
    )
    spec = cluster_spec(
        *(
            instance(role, max_batch_tokens=512, latency=ServerCore(), num_blocks=4096)
            for role in (Role.PREFILL, Role.DECODE)
        ),
        router=structs.replace(ROUTER, strict_roles=True, classes={"tight": tight, "patient": patient}),
    )

    def requests(
        name: str, service: ServiceClass, rate: float, prompt: tuple[int, int], output: tuple[int, int]
    ) -> Iterator[SimulatedRequest]:
        for one in poisson(rate, 150, seed=3, prompt=prompt, output=output):
            one.request_id = RequestId(f"{name}-{one.request_id}")
            one.service_class, one.priority, one.objectives = name, service.priority, service.objectives
            yield one

    all_requests = [
        *requests("tight", tight, 2.5, (50, 150), (10, 30)),
        *requests("patient", patient, 2.5, (400, 1200), (20, 60)),
    ]
    ended = serve(spec, sorted(all_requests, key=lambda request: request.arrival_s))

    of_tight = [one for one in ended if one.service_class == "tight"]
    assert [one.detail for one in of_tight if one.outcome is not Outcome.FINISHED] == []
    assert max(one.ttft_s for one in of_tight) <= 0.5
    assert max(one.ttft_s for one in ended) <= 30.0
