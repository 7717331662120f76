"""Prefill queues against queueing theory (DistServe, section 3.1): mean TTFT within 2%.

Poisson arrivals, one prompt a step, every prompt taking D seconds: an M/D/1 queue. Two pipeline stages of D / 2 make
the queue in front of the first one M/D/1 with half the service time; two-way tensor parallelism with speed-up K makes
the service time D / K.
"""

import pytest
from simulated import cluster_spec, instance, poisson, serve

from disagg.base.request import Role
from disagg.costs.latency import ConstantLatency

D = 0.1
PROMPT_LEN = 16
COUNT = 15_000


def mean_ttft(rate: float, latency: ConstantLatency, seed: int) -> float:
    spec = cluster_spec(
        instance(Role.COLOCATED, latency=latency, max_batch_tokens=PROMPT_LEN, max_steps_in_flight=latency.num_stages)
    )
    ended = serve(spec, poisson(rate, COUNT, seed, prompt=(PROMPT_LEN, PROMPT_LEN), output=(1, 1)))
    return sum(request.ttft_s for request in ended) / COUNT


@pytest.mark.parametrize("rate", [pytest.param(3.0, marks=pytest.mark.slow), 6.0])
def test_one_device(rate: float) -> None:
    expected = D + rate * D**2 / (2 * (1 - rate * D))
    assert mean_ttft(rate, ConstantLatency(D), seed=1) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("rate", [6.0, pytest.param(12.0, marks=pytest.mark.slow)])
def test_two_way_pipeline(rate: float) -> None:
    expected = D + rate * D**2 / (4 * (2 - rate * D))
    assert mean_ttft(rate, ConstantLatency(D, num_stages=2), seed=2) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("speed_up", [1.5, pytest.param(1.9, marks=pytest.mark.slow)])
def test_two_way_tensor(speed_up: float) -> None:
    rate = 8.0
    expected = D / speed_up + rate * D**2 / (2 * speed_up * (speed_up - rate * D))
    assert mean_ttft(rate, ConstantLatency(D / speed_up), seed=3) == pytest.approx(expected, rel=0.02)
