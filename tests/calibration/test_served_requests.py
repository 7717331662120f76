"""What requests cost beside their steps, out of records and CPU clocks."""

import pytest
from cpu_readings import readings

from disagg.bench.client.calls import Call
from disagg.calibration.served_requests import TextPrompts, request_cost
from disagg.costs.serving_fit import ServedRequest
from disagg.measure.record import RequestRecord
from disagg.measure.workload import NO_PREFIX


class WordTokenizer:
    """A token for each five characters."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(text[index]) for index in range(0, len(text), 5)]


def record(prompt_len: int) -> RequestRecord:
    return RequestRecord(
        index=0,
        request_id="r",
        prompt_len=prompt_len,
        max_output_len=2,
        due_s=0.0,
        event_s=(),
        event_tokens=(),
    )


def test_what_is_spent_without_requests_is_no_cost_of_theirs() -> None:
    idle = readings((0.0, 1.0), (2.0, 1.02))  # 10 ms a second
    records = [record(500), record(504), record(502)]
    cost = request_cost(records, readings((5.0, 2.0), (8.0, 2.06)), idle)
    assert cost == ServedRequest(prompt_len=502, num_tokens=2, cpu_s=pytest.approx((0.06 - 0.03) / 3))


def test_a_run_that_took_less_than_idling_costs_nothing() -> None:
    idle = readings((0.0, 1.0), (1.0, 1.1))
    assert request_cost([record(9)], readings((0.0, 0.0), (1.0, 0.05)), idle).cpu_s == 0.0


@pytest.mark.parametrize(("wanted", "longest"), [(100, 1000), (100, 60), (2, 4)])
def test_prompts_are_about_as_long_as_asked_and_differ_from_the_start(wanted: int, longest: int) -> None:
    prompts = TextPrompts(WordTokenizer(), longest)
    call = Call(index=0, prompt_len=wanted, output_len=2, prefix=NO_PREFIX)
    first, second = prompts.make(call), prompts.make(call)
    assert first.num_tokens == len(first.token_ids) <= longest
    assert first.num_tokens == pytest.approx(min(wanted, longest), rel=0.15, abs=1)
    assert first.text[:5] != second.text[:5]
