"""Which load shows what streaming costs, and how its records and the CPU clocks tell."""

import pytest
from cpu_readings import readings

from disagg.calibration.served_streams import StreamLimits, StreamLoad, served_steps
from disagg.measure.record import RequestRecord

LOAD = StreamLoad(
    num_streams=2, stream_prompt_len=10, stream_output_len=100, num_prompts=4, prompt_len=64, num_packed=1
)


def record(*event_s: float) -> RequestRecord:
    return RequestRecord(
        index=0, request_id="r", prompt_len=10, max_output_len=100, due_s=0.0, event_s=event_s, event_tokens=(1,)
    )


def records(prompt_s: float, step_s: float, num_tokens: int = 100) -> list[RequestRecord]:
    streams = [record(*(0.05 + index * step_s for index in range(num_tokens))) for _ in range(2)]
    return streams + [record(0.1 + index * prompt_s) for index in range(4)]


def test_what_counts_is_the_time_in_which_both_instances_computed() -> None:
    # Prompts ran from 0.1 to 0.7 s. What was spent before, on accepting the requests, is no part of it.
    spent = readings((0.0, 5.0), (0.1, 5.4), (0.7, 5.46), (1.05, 5.5))
    (sample,) = served_steps(LOAD, records(prompt_s=0.2, step_s=0.01), spent)
    assert sample.num_streams == 2
    assert sample.cpu_s == pytest.approx(0.06 / 60)


def test_between_two_readings_time_is_spent_evenly() -> None:
    assert readings((0.0, 1.0), (1.0, 1.5), (2.0, 3.5)).between(0.5, 1.5) == pytest.approx(1.25)


@pytest.mark.parametrize(("prompt_s", "num_tokens"), [(0.2, 8), (0.01, 100)])
def test_a_load_that_ended_too_soon_shows_nothing(prompt_s: float, num_tokens: int) -> None:
    assert served_steps(LOAD, records(prompt_s, 0.01, num_tokens), readings((0.0, 0.0), (2.0, 1.0))) == []


def test_prompts_fill_whole_steps_and_fit_the_model() -> None:
    roomy = StreamLoad.within(StreamLimits(8192, 512, 64, 1000), num_streams=16, num_prompts=8)
    assert (roomy.num_streams, roomy.prompt_len, roomy.num_packed, roomy.num_prompts) == (16, 512, 1, 8)
    tight = StreamLoad.within(StreamLimits(202, 512, 4, 1000), num_streams=16, num_prompts=8)
    assert (tight.num_streams, tight.prompt_len, tight.num_packed, tight.num_prompts) == (4, 170, 3, 24)
    assert tight.stream_prompt_len + tight.stream_output_len <= 202
    assert sum(request.output_len == 1 for request in tight.requests().requests) == 24
