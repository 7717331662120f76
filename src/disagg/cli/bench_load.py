"""Flags and words that the benchmarks with a load client share: whom to ask, with what, and how it goes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import msgspec

from disagg.base.errors import ConfigurationError
from disagg.bench.client.load_plan import (
    Asking,
    Endpoint,
    Limits,
    LoadPlan,
    OpenLoad,
    Server,
)
from disagg.bench.client.progress import LoadProgress
from disagg.bench.client.running import Watch
from disagg.cli.values import Count, Name, Number
from disagg.cli.workload_flags import SloTargetType
from disagg.measure.slo import Slo, SloTarget, parse_target

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_URL: Final = "http://127.0.0.1:8000"
DEFAULT_SLO: Final = "ttft=250ms,tpot=100ms@90%"
_COUNT: Final = Count(min=1)
_SECONDS: Final = Number(min=0, min_open=True)

_OPTIONS: Final = (
    click.option("--url", default=DEFAULT_URL, show_default=True, help="Any server with OpenAI's API."),
    click.option(
        "--endpoint",
        type=Name([one.value for one in Endpoint]),
        default=Endpoint.COMPLETIONS.value,
        show_default=True,
        help="How prompts are sent: as text, as token ids, or as a chat.",
    ),
    click.option("--name", default="", help="What reports call this system.  [default: the model]"),
    click.option("--model", default="", metavar="NAME", help="Model to ask for.  [default: the server's first]"),
    click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, metavar="KEY", help="Sent as a bearer token."),
    click.option(
        "--tokenizer",
        metavar="NAME|FOLDER|FILE",
        help="Model, folder or tokenizer.json that counts the prompts' tokens.  [default: that of the default model]",
    ),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help='Text to make prompts of: .txt, or .jsonl with "prompt".  [default: English that Python carries]',
    ),
    click.option(
        "--prompt-seed",
        type=int,
        metavar="N",
        help="Make the same texts as another run with N, which a prefix cache may know.  [default: new texts]",
    ),
    click.option("--temperature", type=Number(min=0), default=0.0, show_default=True, help="Of sampling."),
    click.option(
        "--ignore-eos/--no-ignore-eos", default=True, show_default=True, help="Answers as long as the workload says."
    ),
    click.option("--min-tokens", is_flag=True, help="Ask for min_tokens too, for servers that stop earlier."),
    click.option(
        "--continuous-usage/--no-continuous-usage",
        default=True,
        show_default=True,
        help="Ask for token counts in every event, so that an event of several tokens is counted right.",
    ),
    click.option("--extra-body", metavar="JSON", help="Further fields of every request, as a JSON object."),
    click.option(
        "--slo",
        type=SloTargetType(),
        help="Objectives, the part of requests that keep both, and limits on percentiles such as ttft.p99<=2s.  "
        f"[default: {DEFAULT_SLO}]",
    ),
    click.option(
        "--goodput", multiple=True, metavar="ttft:MS tpot:MS", help="The same in the words of vllm bench serve."
    ),
    click.option("--warmup", "num_warmup", type=_COUNT, default=1, show_default=True, help="Requests before the run."),
    click.option("--request-timeout-s", type=_SECONDS, default=600.0, show_default=True, help="Longest request."),
    click.option(
        "--max-outstanding",
        type=_COUNT,
        default=1000,
        show_default=True,
        metavar="N",
        help="Give the run up when more requests than this are under way.",
    ),
)


def load_options(function: F) -> F:
    """Add the flags, and an argument for the words of ``--goodput`` that follow its first."""
    function = click.argument("more_goodput", nargs=-1, metavar="", required=False)(function)
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def choose_slo(values: Mapping[str, Any]) -> SloTarget:
    """Return the target of ``--slo`` or ``--goodput``; raise UsageError for both, or for words without a flag."""
    words = [*values["goodput"], *values["more_goodput"]]
    if values["more_goodput"] and not values["goodput"]:
        raise click.UsageError(f"unexpected argument {values['more_goodput'][0]!r}")
    if words and values["slo"] is not None:
        raise click.UsageError("--slo and --goodput say the same: give one of them")
    chosen = values["slo"] or parse_target(" ".join(words) or DEFAULT_SLO)
    assert isinstance(chosen, SloTarget)
    return chosen


def choose_plan(values: Mapping[str, Any], slo: Slo) -> LoadPlan:
    """Return a plan without a load."""
    return LoadPlan(
        server=Server(values["url"], Endpoint(values["endpoint"]), values["model"], values["api_key"]),
        load=OpenLoad(()),
        prompt_seed=values["prompt_seed"],
        asking=Asking(
            temperature=values["temperature"],
            ignore_eos=values["ignore_eos"],
            min_tokens=values["min_tokens"],
            continuous_usage=values["continuous_usage"],
            extra=_extra_body(values["extra_body"]),
        ),
        limits=Limits(
            request_timeout_s=values["request_timeout_s"], max_outstanding=values["max_outstanding"], slo=slo
        ),
        num_warmup=values["num_warmup"],
    )


def _extra_body(text: str | None) -> dict[str, object]:
    try:
        return {} if text is None else msgspec.json.decode(text, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise ConfigurationError(f"--extra-body {text!r} is not a JSON object: {error}") from error


@contextmanager
def shown_progress(what: str) -> Iterator[Watch]:
    """Show a run on stderr while it goes on. Drawn only when asked, twice a second: the client's time is dear."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[state]}"))
    hidden = not console.is_terminal
    with Bar(*columns, console=console, transient=True, auto_refresh=False, disable=hidden) as bar:
        task = bar.add_task(what, total=None, state="preparing")
        bar.refresh()

        def watch(progress: LoadProgress) -> None:
            done = progress.num_finished + progress.num_failed
            bar.update(task, total=progress.num_requests, completed=done, state=describe_progress(progress))
            bar.refresh()

        yield watch


def describe_progress(progress: LoadProgress) -> str:
    """Return a line for people."""
    failed = f", {progress.num_failed} failed" if progress.num_failed else ""
    return (
        f"{progress.num_finished}/{progress.num_requests} finished{failed}, {progress.num_running} running, "
        f"{progress.request_rate:.2f} requests/s, {progress.output_tokens_per_s:.0f} tokens/s, "
        f"TTFT {progress.ttft_s * 1e3:.0f} ms, TPOT {progress.tpot_s * 1e3:.1f} ms"
    )
