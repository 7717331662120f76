"""Step times learned from the steps that run."""

import random

import pytest

from disagg.costs.latency import ConstantLatency, StepShape
from disagg.costs.step_times import StepTimes


def shape(prefill: int = 0, start: int = 0, decodes: int = 0, context: int = 0) -> StepShape:
    one = StepShape(num_decodes=decodes, decode_context=context)
    if prefill:
        one.add_prefill(start, prefill)
    return one


def truth_s(one: StepShape, speed: float = 1.0) -> float:
    time_s = 3e-3 + 8e-4 * one.num_tokens + 1e-7 * one.prefill_squares + 4e-6 * one.decode_context
    return time_s * speed


def draw(rng: random.Random) -> StepShape:
    decodes = rng.randint(0, 24)
    return shape(rng.choice([0, 0, 16, 60, 300]), rng.randint(0, 900), decodes, decodes * rng.randint(50, 900) or 0)


def teach(times: StepTimes, rng: random.Random, count: int, speed: float = 1.0) -> None:
    for _ in range(count):
        one = draw(rng)
        if one.num_tokens:
            times.note(one, times.predict_s(one), truth_s(one, speed))


@pytest.mark.parametrize("speed", [0.01, 1.0, 20.0])
def test_what_steps_cost_is_learned_whatever_the_machine(speed: float) -> None:
    times, rng = StepTimes(), random.Random(1)
    teach(times, rng, 300, speed)
    for one in (shape(prefill=200), shape(decodes=8, context=3000), shape(prefill=100, decodes=10, context=2000)):
        assert times.predict_s(one) == pytest.approx(truth_s(one, speed), rel=0.05)
    assert times.error < 0.1


def test_a_machine_that_becomes_slower_is_followed() -> None:
    times, rng = StepTimes(), random.Random(2)
    teach(times, rng, 500)
    teach(times, rng, 1500, speed=2.0)
    one = shape(prefill=100, decodes=10, context=2000)
    assert times.predict_s(one) == pytest.approx(truth_s(one, 2.0), rel=0.1)


def test_decodes_alone_do_not_make_the_cost_of_prefill_forgotten() -> None:
    times, rng = StepTimes(), random.Random(3)
    teach(times, rng, 500)
    for _ in range(5000):
        one = shape(decodes=4, context=1000)
        times.note(one, times.predict_s(one), truth_s(one))
    one = shape(prefill=300)
    assert times.predict_s(one) == pytest.approx(truth_s(one), rel=0.05)


def test_predictions_never_fall_with_more_work() -> None:
    times, rng = StepTimes(), random.Random(4)
    for _ in range(200):
        one = draw(rng)
        times.note(one, times.predict_s(one), rng.uniform(1e-3, 1e-1))
        assert times.predict_s(shape(prefill=20)) <= times.predict_s(shape(prefill=200))


def test_a_given_model_is_not_changed_by_what_happens_but_its_error_is_counted() -> None:
    times = StepTimes(ConstantLatency(0.02))
    for _ in range(200):
        times.note(shape(prefill=5), times.predict_s(shape(prefill=5)), 0.04)
    assert times.predict_s(shape(prefill=5)) == 0.02
    assert (times.num_steps, times.version) == (200, 0)
    assert times.error == pytest.approx(0.5, abs=0.02)
    assert times.measured_s == pytest.approx(2 * times.predicted_s)


def test_what_nobody_measured_teaches_nothing() -> None:
    times = StepTimes()
    times.note(shape(prefill=5), 1.0, 0.0)
    assert (times.num_steps, times.version) == (0, 0)
