"""``disagg bench goodput``: the highest rate at which a running server keeps its objectives."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from disagg.bench.client.goodput import GoodputPlan, find_goodput
from disagg.bench.client.goodput_report import goodput_report, save_search
from disagg.bench.client.inquiries import num_instances
from disagg.bench.client.load_plan import Load, LoadPlan, load_of
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.cli.bench_goodput_report import print_report
from disagg.cli.bench_load import choose_plan, choose_slo, load_options, shown_progress
from disagg.cli.values import Count, Number, OutputPath
from disagg.cli.workload_flags import WORKLOAD_HELP, choose_load, choose_target, workload_options
from disagg.measure.sessions import SessionWorkload

_COUNT = Count(min=1)
_ABOVE_ZERO = Number(min=0, min_open=True)
_MANY: Final = 1_000_000
"""Requests of a workload that is drawn for as long as it is wanted."""


class Factors(click.ParamType[tuple[float, ...]]):
    """Positive numbers: 0.5,0.75,1.25."""

    name = "factors"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers; none for an empty text."""
        if isinstance(value, tuple):
            return value
        try:
            factors = tuple(float(part) for part in str(value).split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 0.5,0.75,1.25", param, ctx)
        if not all(0 < factor < math.inf for factor in factors):
            self.fail(f"{value!r}: factors are above 0", param, ctx)
        return factors


@click.command(epilog=WORKLOAD_HELP)
@load_options
@workload_options
@click.option(
    "--attainment",
    type=Number(0, 1, min_open=True),
    metavar="PART",
    help="Part of all requests that must keep both objectives, in place of that in --slo.",
)
@click.option(
    "--run-s", type=_ABOVE_ZERO, default=30.0, show_default=True, metavar="SECONDS", help="Length of a run at a rate."
)
@click.option(
    "--min-requests", type=_COUNT, default=50, show_default=True, metavar="N", help="Longer runs, to have so many."
)
@click.option(
    "--drain-s",
    type=_ABOVE_ZERO,
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long after a run's last request its answers may take.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the first run's workload.")
@click.option("--seeds", type=_COUNT, default=1, show_default=True, metavar="K", help="Runs at each rate.")
@click.option(
    "--tolerance", type=_ABOVE_ZERO, default=0.05, show_default=True, metavar="PART", help="How near to close in."
)
@click.option(
    "--grid",
    type=Factors(),
    default="0.5,0.75,1.25,1.5",
    show_default=True,
    metavar="F,F,...",
    help="Then run at these multiples of what was found, for the curve; '' for none.",
)
@click.option(
    "--devices",
    "num_devices",
    type=_COUNT,
    metavar="N",
    help="Devices to divide by.  [default: the server's instances]",
)
@click.option(
    "--save", type=OutputPath("the results", makes_folder=True), metavar="FILE.json", help="For bench report."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def goodput(num_devices: int | None, save: Path | None, as_json: bool, **values: Any) -> None:
    """Search the highest rate, per device, at which a server keeps its objectives.

    Doubles or halves the rate from --rate (1 unless given) until some rate keeps the attainment and another does not,
    then halves between the two. A run is given up as soon as the attainment is out of reach.
    """
    target = choose_target(choose_slo(values), values["attainment"])
    plan = choose_plan(values, target.slo)
    name, load_at = _loads(values)
    source = load_prompt_source(values["tokenizer"], values["prompts"])
    asked = GoodputPlan(
        plan=plan,
        load_at=load_at,
        start_rate=values["rate"] or 1.0,
        target=target,
        seeds=range(values["seed"], values["seed"] + values["seeds"]),
        tolerance=values["tolerance"],
        drain_s=values["drain_s"],
        grid=values["grid"],
    )

    def run(one: LoadPlan, what: str) -> LoadResult:
        with shown_progress(what) as watch:
            return run_load(one, source, watch)

    counted = num_instances(plan.server) if num_devices is None else num_devices
    found = find_goodput(asked, run)
    report = goodput_report(asked, found, workload=name, run_s=values["run_s"], num_devices=counted)
    print_report(report, as_json)
    if save is not None:
        save_search(save, report, found, values["name"])


def _loads(values: dict[str, Any]) -> tuple[str, Callable[[float, int], Load]]:
    """Return the workload's name, and what is sent at a rate with a seed for the length of a run."""
    workload = choose_load({**values, "rate": values["rate"] or 1.0, "num_requests": values["num_requests"] or _MANY})
    least = 1 if isinstance(workload, SessionWorkload) else values["min_requests"]

    def load_at(rate: float, seed: int) -> Load:
        return load_of(workload.at_rate(rate), seed, count=max(least, math.ceil(rate * values["run_s"])))

    return workload.name, load_at
