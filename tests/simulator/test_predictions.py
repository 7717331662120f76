"""Predictions beside what came, where nothing but the policy's own view can be wrong: steps cost what a line says."""

import pytest
from simulated import cluster_spec, instance, poisson

from disagg.base.config import RouterSettings, SchedulingMode
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.costs.latency import StepShape
from disagg.measure.slo import Slo
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
    instances = [
        instance(
            role,
            number,
            scheduling=SchedulingMode.SLACK,
            objectives=Objectives(ttft_s=TTFT_S, tpot_s=TPOT_S),
            max_batch_tokens=512,
            tells_costs=True,
            latency=SmallModelOnOneCore(),
            num_blocks=4096,
        )
        for number, role in enumerate(roles)
    ]
    requests = poisson(0.4, 150, seed=5, prompt=(4, 1500))
    report = simulate(cluster_spec(*instances, router=ROUTER), requests, Slo(ttft_s=TTFT_S, tpot_s=TPOT_S))
    assert report.paths is not None
    assert report.paths.tpot_error < 0.15
