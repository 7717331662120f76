"""What a server does with more than it can serve: ``python benchmarks/overload.py --rate 1.5``.

``--rate`` is what the deployment serves within its objectives, in chat requests/s. First ``--factor`` times as many
come, once for each way of ``--overload``: of the answered ones, how many kept their objectives, how many were refused,
how long the longest waited. Then one user asks at a third of the rate, alone, and beside another one whose requests
come at ``--factor`` times the rate: what of the first one's attainment is left. One prefill and one decode instance.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from disagg.base.service_classes import Overload
from disagg.bench.client.load_plan import Asking, LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import run_load
from disagg.bench.compare.server_process import running, serve_command
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.standard import standard_workload
from disagg.measure.statistics import Percentiles
from disagg.measure.workload import RequestSpec

LEARNING_S = 8.0
"""Before the load, the server learns from requests at the rate that it serves what its steps cost."""
SEED = 1
QUIET_SHARE = 1 / 3
"""Of the rate that the server serves, what the user asks for who is not a flood."""


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of one user or one run. Seconds."""

    name: str
    sent: int
    answered: int
    refused: int
    failed: int
    kept: int
    """Answered within both objectives."""
    best_effort: int
    """Answered when others left time, as they were predicted to miss their objectives."""
    best_effort_kept: int
    ttft_p50_s: float
    ttft_p99_s: float
    longest_wait_s: float
    tpot_p99_s: float

    @classmethod
    def of(cls, name: str, records: Sequence[RequestRecord], slo: Slo) -> "Outcome":
        """Count."""
        answered = [one for one in records if one.ending is Ending.FINISHED]
        refused = [one for one in records if one.ending is Ending.REFUSED]
        ttft = Percentiles.of([one.ttft_s for one in answered])
        return cls(
            name=name,
            sent=len(records),
            answered=len(answered),
            refused=len(refused),
            failed=len(records) - len(answered) - len(refused),
            kept=sum(one.meets(slo) for one in answered),
            best_effort=sum(one.is_best_effort for one in answered),
            best_effort_kept=sum(one.meets(slo) for one in answered if one.is_best_effort),
            ttft_p50_s=ttft.p50,
            ttft_p99_s=ttft.p99,
            longest_wait_s=max((one.ttft_s for one in answered), default=0.0),
            tpot_p99_s=Percentiles.of([one.tpot_s for one in answered]).p99,
        )

    def row(self) -> str:
        """Return a line of the table."""
        cells = (
            self.name,
            str(self.sent),
            str(self.answered),
            str(self.refused),
            str(self.failed),
            _share(self.kept - self.best_effort_kept, self.answered - self.best_effort),
            _share(self.best_effort_kept, self.best_effort),
            f"{self.ttft_p50_s:.2f}, {self.ttft_p99_s:.2f}, {self.longest_wait_s:.2f} s",
            f"{1e3 * self.tpot_p99_s:.1f} ms",
        )
        return f"| {' | '.join(cells)} |"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%} of {whole}" if whole else "-"


def requests(rate: float, seconds: float, seed: int) -> tuple[RequestSpec, ...]:
    """Return chat requests that arrive for so long, behind a short one, with which the client tries the server."""
    workload = standard_workload("chat", rate, max(2, round(rate * seconds)))
    return (RequestSpec(16, 2, arrival_s=0.0), *workload.draw(seed))


def ask(url: str, load: tuple[RequestSpec, ...], user: str) -> tuple[RequestRecord, ...]:
    """Send them all as one user."""
    plan = LoadPlan(server=Server(url), load=OpenLoad(load), asking=Asking(extra={"user": user}))
    return run_load(plan, load_prompt_source()).records


@contextmanager
def server(arguments: argparse.Namespace, overload: Overload) -> Iterator[str]:
    """Start a server that knows what its steps cost; yield its URL."""
    flags = ("--prefill", "1", "--decode", "1", "--slo", str(arguments.slo), "--overload", overload.value)
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command(overload.value, (*flags, *arguments.serve)), Path(folder) / "log") as running_one:
            ask(running_one.command.url, requests(arguments.rate, LEARNING_S, SEED + 1), "first")
            yield running_one.command.url


def overloaded(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Yield what became of a load that is far beyond the server, for each way to deal with it."""
    load = requests(arguments.factor * arguments.rate, arguments.seconds, SEED)
    for overload in arguments.overload:
        with server(arguments, overload) as url:
            yield Outcome.of(f"{arguments.factor:g} x, {overload.value}", ask(url, load, "all"), arguments.slo)


def beside_a_flood(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Yield what became of a user's requests, alone and beside those of one who floods the server, and of the flood."""
    quiet = requests(QUIET_SHARE * arguments.rate, arguments.seconds, SEED)
    flood = requests(arguments.factor * arguments.rate, arguments.seconds, SEED + 2)
    with server(arguments, Overload.SHED) as url, ThreadPoolExecutor() as threads:
        yield Outcome.of("a user alone", ask(url, quiet, "quiet"), arguments.slo)
        time.sleep(1.0)
        both = [threads.submit(ask, url, load, user) for load, user in ((quiet, "quiet"), (flood, "flood"))]
        for name, future in zip(("the user beside a flood", "the flood"), both, strict=True):
            yield Outcome.of(name, future.result(), arguments.slo)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, required=True, help="chat requests/s that are served within --slo")
    parser.add_argument("--slo", type=parse_slo, default="ttft=1400ms,tpot=15ms")
    parser.add_argument("--factor", type=float, default=10.0, help="times the rate that come")
    parser.add_argument("--seconds", type=float, default=40.0, help="for which they come")
    parser.add_argument("--overload", nargs="+", type=Overload, default=[Overload.SHED, Overload.BEST_EFFORT])
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="last: further flags of disagg serve")
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    arguments = parse()
    if not arguments.json:
        print(
            "| | sent | answered | refused | failed | of the answered kept both | of best effort kept both "
            "| TTFT P50, P99, longest | TPOT P99 |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
    for measure in (overloaded, beside_a_flood):
        for outcome in measure(arguments):
            print(json.dumps(asdict(outcome)) if arguments.json else outcome.row(), flush=True)


if __name__ == "__main__":
    main()
