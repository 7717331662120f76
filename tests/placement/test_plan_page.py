"""The page of a plan with its curves, and what the plan would be at other rates and with other prompts."""

from pathlib import Path

import pytest
from msgspec import structs
from planning import nodes, problem, topology

from disagg.base.errors import ConfigurationError
from disagg.cli.plan_page import draw_nodes, page, write_page
from disagg.placement.curves import RATE_PARTS, SLO_SCALES, attainment_curves
from disagg.placement.describe import describe
from disagg.placement.plan import OneRouter, Plan
from disagg.placement.planner import search
from disagg.placement.sensitivity import PROMPT_FACTORS, RATE_FACTORS, prompt_shifts, rate_shifts
from disagg.placement.workers import Workers


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two devices, a target rate that one of them serves, and everything that can be asked of the search."""
    workers = Workers(1)
    one = problem(topology=topology(nodes(1, 2)), target_rate=2.0, min_requests=20, max_requests=20)
    found = search(one, workers, lambda progress: None)
    return structs.replace(
        describe(found),
        curves=attainment_curves(found, workers),
        rate_shifts=rate_shifts(found),
        prompt_shifts=prompt_shifts(found, workers),
    )


def test_attainment_falls_with_the_rate_and_rises_with_the_objectives(plan: Plan) -> None:
    rates, scales = (
        next(curve for curve in plan.curves if curve.over == over) for over in ("rate per device", "SLO scale")
    )
    assert (len(rates.x), scales.x) == (len(RATE_PARTS), SLO_SCALES)
    assert rates.attainment[0].share >= rates.attainment[-1].share
    assert scales.attainment[0].share <= scales.attainment[-1].share


def test_other_rates_take_other_numbers_of_devices(plan: Plan) -> None:
    assert len(plan.rate_shifts) == len(RATE_FACTORS)
    devices = [shift.num_devices for shift in plan.rate_shifts]
    assert devices == sorted(devices)


def test_longer_prompts_cost_goodput(plan: Plan) -> None:
    assert [shift.factor for shift in plan.prompt_shifts] == list(PROMPT_FACTORS)
    reached = [shift.goodput_per_device for shift in plan.prompt_shifts]
    assert reached[0] > reached[-1]


def test_the_page_shows_every_device_and_loads_nothing(plan: Plan, tmp_path: Path) -> None:
    write_page(plan, tmp_path / "plan.html")
    text = (tmp_path / "plan.html").read_text()
    assert text == page(plan)
    assert plan.best.words in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert text.count('class="device"') == sum(len(node.devices) for node in draw_nodes(plan.best))
    assert text.count("<figure") == 3
    assert text.count("the same instances, ") > 0


def test_the_page_tells_what_one_router_serves(plan: Plan) -> None:
    text = page(structs.replace(plan, behind_one_router=OneRouter(asked=2.0, served=1.0)))
    assert "serves 1 of these 2 requests/s (-50%)" in text
    same = page(structs.replace(plan, behind_one_router=OneRouter(asked=2.0, served=2.0)))
    assert "behind one router serves 2 requests/s as well" in same


def test_a_page_that_cannot_be_written_is_told(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot write the page"):
        write_page(plan, tmp_path / "nowhere" / "plan.html")
