"""Flags that say which requests arrive when, and how fast they are to be answered: for simulation and benchmarks."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import click
from msgspec import structs

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.cli.values import Count, Name, Number
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.open_loop import FixedLengths, LengthLimits, OpenLoop, RequestSource
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo, SloTarget, parse_slo, parse_target
from disagg.measure.standard import STANDARD_WORKLOADS, standard_workload
from disagg.measure.trace import Trace

F = TypeVar("F", bound=Callable[..., Any])

_ABOVE_ZERO: Final = Number(min=0, min_open=True)
_COUNT: Final = Count(min=1)
DEFAULT_NUM_REQUESTS: Final = 200
"""Of workloads that are drawn and have no end of their own."""

WORKLOAD_HELP: Final = """A workload is one of chat, code, summarise and reason (drawn like public traces; replayed from
their files with --traces), or a file, gzipped or not: .jsonl with input_length, output_length and, where they are
known, timestamp (ms) and hash_ids of 512-token blocks (Mooncake); .csv with prompt_len, output_len, arrival_s
(DistServe), ContextTokens, GeneratedTokens, TIMESTAMP (Azure), or num_prefill_tokens, num_decode_tokens (Vidur).
Without times, or where all are equal, arrivals are drawn at --rate."""


class SloType(click.ParamType[Slo]):
    """Latency objectives: ttft=250ms,tpot=100ms."""

    name = "slo"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Slo:
        """Return the objectives."""
        if isinstance(value, Slo):
            return value
        try:
            return parse_slo(str(value))
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


def choose_target(slo: SloTarget, attainment: float | None) -> SloTarget:
    """Return the target of ``--slo``, kept by the part of ``--attainment`` where that is given."""
    return slo if attainment is None else structs.replace(slo, attainment=attainment)


class SloTargetType(click.ParamType[SloTarget]):
    """Objectives with the part of requests that keeps them, and limits on percentiles: ttft=250ms,tpot=100ms@90%."""

    name = "slo"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> SloTarget:
        """Return the target."""
        if isinstance(value, SloTarget):
            return value
        try:
            return parse_target(str(value))
        except ConfigurationError as error:
            self.fail(str(error), param, ctx)


_OPTIONS: Final = (
    click.option("--workload", metavar="NAME|FILE", help="Requests: see below."),
    click.option(
        "--sessions",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Instead: calls of agents, one after another (kv-cache-tester, or a shard of Azure's GitHub Copilot "
        "traces), --rate in sessions/s.",
    ),
    click.option(
        "--longest-think",
        "longest_think_s",
        type=Number(min=0),
        default=30.0,
        show_default=True,
        metavar="SECONDS",
        help="Cut the time between the calls of a session.",
    ),
    click.option("--prompt-len", type=_COUNT, metavar="N", help="Without --workload: tokens of every prompt."),
    click.option("--output-len", type=_COUNT, metavar="N", help="Without --workload: tokens of every answer."),
    click.option(
        "--traces",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Trace files that the named workloads replay.",
    ),
    click.option("--rate", type=_ABOVE_ZERO, metavar="R", help="Requests/s, by stretching the times or drawing them."),
    click.option("--scale", type=_ABOVE_ZERO, metavar="S", help="Factor on the file's own rate."),
    click.option(
        "--requests", "num_requests", type=_COUNT, metavar="N", help="Only the first N requests, or sessions."
    ),
    click.option(
        "--arrivals",
        type=Name([kind.value for kind in ArrivalKind]),
        help="Where times come from.  [default: the file's, else poisson]",
    ),
    click.option("--cv", "gap_cv", type=_ABOVE_ZERO, default=1.0, help="Coefficient of variation of gamma gaps."),
    click.option(
        "--spread-batches",
        "batch_s",
        type=Number(min=0),
        default=0.0,
        metavar="SECONDS",
        help="Spread times that the file rounds down to batches of this length (Mooncake: 3).",
    ),
    click.option("--shorten", type=Number(min=0, max=1, min_open=True), metavar="F", help="Factor on all lengths."),
    click.option("--max-total-len", type=Count(min=2), metavar="N", help="Cut prompts so that all fit."),
)


def workload_options(function: F) -> F:
    """Add the flags; ``choose_workload`` takes the values."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def choose_workload(values: Mapping[str, Any]) -> OpenLoop:
    """Return the workload that the flags describe; raise ConfigurationError when they contradict each other."""
    rate, scale = values["rate"], values["scale"]
    if rate is not None and scale is not None:
        raise ConfigurationError("--rate and --scale both set the rate: give one of them")
    workload = _standard(values) if values["workload"] in STANDARD_WORKLOADS else _own(values)
    if values["shorten"] is not None:
        workload = replace(workload, length_factor=values["shorten"])
    if values["max_total_len"] is not None:
        workload = replace(workload, limits=replace(workload.limits, max_total_len=values["max_total_len"]))
    return workload


def choose_load(values: Mapping[str, Any]) -> OpenLoop | SessionWorkload:
    """Return the sessions, or else the workload, that the flags describe."""
    if values["sessions"] is None:
        return choose_workload(values)
    if values["workload"] is not None or values["rate"] is None:
        raise ConfigurationError("--sessions needs --rate, in sessions/s, and no --workload")
    return SessionWorkload(
        values["sessions"],
        values["rate"],
        num_sessions=values["num_requests"],
        longest_think_s=values["longest_think_s"],
        length_factor=values["shorten"] or 1.0,
        max_total_len=values["max_total_len"] or 2**31,
    )


def _standard(values: Mapping[str, Any]) -> OpenLoop:
    name = values["workload"]
    if values["rate"] is None:
        raise ConfigurationError(f"the workload {name} has no rate of its own: give --rate")
    workload = standard_workload(name, values["rate"], values["num_requests"] or DEFAULT_NUM_REQUESTS, values["traces"])
    if values["arrivals"] is None:
        return workload
    kind = ArrivalKind(values["arrivals"])
    return replace(workload, arrivals=Arrivals(kind, values["rate"], values["gap_cv"], values["batch_s"]))


def _own(values: Mapping[str, Any]) -> OpenLoop:
    source = _source(values)
    has_rate = math.isfinite(source.rate)  # not so without times, nor when all requests come at once
    if values["arrivals"] is not None:
        kind = ArrivalKind(values["arrivals"])
    elif has_rate or (not math.isnan(source.rate) and values["rate"] is None):
        kind = ArrivalKind.REPLAY
    else:
        kind = ArrivalKind.POISSON
    if values["scale"] is not None and not has_rate:
        why = "has no times" if math.isnan(source.rate) else "has all its requests at one time"
        raise ConfigurationError(f"--scale multiplies the workload's rate, but this one {why}: give --rate")
    rate = values["rate"] if values["scale"] is None else values["scale"] * source.rate
    return OpenLoop(source, Arrivals(kind, rate, values["gap_cv"], values["batch_s"]), LengthLimits())


def _source(values: Mapping[str, Any]) -> RequestSource:
    name, prompt_len, output_len = values["workload"], values["prompt_len"], values["output_len"]
    if (name is None) == (prompt_len is None or output_len is None):
        raise ConfigurationError(
            f"give --workload (a file, or one of {', '.join(STANDARD_WORKLOADS)}), or --prompt-len and --output-len"
        )
    if name is None:
        return FixedLengths(prompt_len, output_len, values["num_requests"] or DEFAULT_NUM_REQUESTS)
    path = Path(name)
    if not path.suffix and not path.exists():
        raise ConfigurationError(
            f"no workload and no file is called {name!r}; as workloads {known_names(name, STANDARD_WORKLOADS)}"
        )
    return Trace(path, values["num_requests"])
