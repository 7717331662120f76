"""The report of ``disagg plan``, for people and as JSON."""

import math

import click
import msgspec
from rich.console import Console
from rich.table import Table

from disagg.measure.statistics import Estimate
from disagg.placement.plan import CORE, Plan, PlannedPlacement


def print_plan(plan: Plan, as_json: bool, took_s: float) -> None:
    """Write the plan to stdout."""
    if as_json:
        click.echo(msgspec.json.encode(plan).decode())
        return
    console = Console(highlight=False)
    wanted = "as much as the cluster can" if plan.target_rate is None else f"{plan.target_rate:g} requests/s"
    console.print(f"[bold]{plan.model}[/]\n{plan.workload}, {plan.target}, {wanted}\n")
    console.print(_placements(plan))
    console.print()
    for number, one in enumerate(plan.placements, start=1):
        console.print(f"{number}  [bold]{one.words}[/] ({one.family.value})\n   held back by {one.bottleneck}")
        steps = [f"{part.role}: {part.batching}" for part in one.instances if part.batching]
        if steps and one.instances[0].kind != CORE:
            console.print(f"   steps of {'; '.join(steps)}")
    best = plan.best
    console.print("\nthe first")
    for group in best.placement.groups:
        where = f" on {', '.join(group.devices)}" if group.devices else ""
        console.print(f"  {group.count} x {group.role.value}{where}")
    if plan.target_rate is not None and best.goodput.mean < plan.target_rate:
        console.print(f"[bold]the cluster does not reach {plan.target_rate:g} requests/s[/]")
    if best.objective_costs:
        told = ", ".join(f"{name.upper()} {part:.1%}" for name, part in best.objective_costs.items())
        console.print(f"of its requests at that rate miss: {told}")
    if plan.behind_one_router is not None:
        console.print(router_words(plan))
    if plan.losing:
        console.print("\nwhy not")
    for other in plan.losing:
        console.print(f"  {other.words}\n    {other.reason}")
    _print_shifts(plan, console)
    for note in plan.notes:
        console.print(f"\nnote: {note}")
    console.print(f"\n{effort_words(plan)} in {took_s:.1f} s")


def router_words(plan: Plan) -> str:
    """Return how the placement does as it is written, behind one router, where units were simulated apart."""
    one = plan.behind_one_router
    assert one is not None, "asked where there are several units"
    begin = f"{plan.best.num_units} equal unit{'s' * (plan.best.num_units > 1)}, simulated apart"
    if one.is_as_predicted:
        return f"{begin}; all of it behind one router serves {one.asked:.3g} requests/s as well"
    crossing = ", which hands over from unit to unit," if len(plan.best.instances) > 1 else ""
    return (
        f"{begin}. The placement as it is written, behind one router{crossing} serves {one.served:.3g} of these "
        f"{one.asked:.3g} requests/s ({one.served / one.asked - 1:+.0%}): serve each unit by itself"
    )


def _print_shifts(plan: Plan, console: Console) -> None:
    """Print what the answer would be at other rates, and with other prompts."""
    if plan.rate_shifts:
        console.print("\nif the rate were")
    for other in plan.rate_shifts:
        verdict = "more than the cluster serves" if not other.is_reached else f"{other.num_devices} devices"
        same = "the same instances" if other.has_same_instances else other.best
        console.print(f"  {other.rate:.3g} requests/s: {same}, {verdict}")
    if plan.prompt_shifts:
        console.print("\nif prompts were")
    for shift in plan.prompt_shifts:
        verdict = "the same" if shift.is_same else f"{shift.best}, this answer {shift.chosen_per_device:.3g}"
        reached = f"{shift.goodput_per_device:.3g} requests/s per device"
        console.print(f"  {shift.factor:g} times as long: {verdict}; {reached}")


def _placements(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False)
    is_of_cores = plan.best.instances[0].kind == CORE
    for heading in (
        "",
        "cores" if is_of_cores else "devices",
        "requests/s",
        "per core" if is_of_cores else "per device",
    ):
        table.add_column(heading, justify="right")
    for heading in ("per $/h", "per kW", "TTFT P90", "TPOT P90"):
        table.add_column(heading, justify="right")
    for number, one in enumerate(plan.placements, start=1):
        table.add_row(
            str(number),
            str(one.num_devices),
            _estimate(one.goodput),
            _estimate(one.goodput_per_device),
            _or_dash(one.goodput_per_dollar),
            _or_dash(None if one.goodput_per_watt is None else one.goodput_per_watt * 1e3),
            *_latencies(one),
        )
    return table


def _latencies(one: PlannedPlacement) -> tuple[str, str]:
    values = (one.ttft_p90_s, one.tpot_p90_s)
    ttft, tpot = ("-" if math.isnan(value) else f"{value * 1e3:.0f} ms" for value in values)
    return ttft, tpot


def _estimate(value: Estimate) -> str:
    interval = "" if math.isnan(value.half_width) else f" ± {value.half_width:.2g}"
    return f"{value.mean:.3g}{interval}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def effort_words(plan: Plan) -> str:
    """Return what the search did, for people."""
    effort = plan.effort
    stopped = "" if effort.is_complete else "stopped before the end: "
    if plan.best.instances and plan.best.instances[0].kind == CORE:
        return f"{stopped}{effort.num_compositions} placements compared, {effort.num_runs} runs simulated"
    return (
        f"{stopped}{effort.num_choices} instances fit the model ({effort.num_refused} do not), {effort.num_ruled_out} "
        f"ruled out by bounds, {effort.num_compositions} placements compared, {effort.num_runs} runs simulated"
    )
