"""The same live: what ``disagg serve --replan act`` keeps on a load that turns from chat to code and back.

    python benchmarks/replan_live.py ../shared/data/traces [--seconds 45] [--chat-rate 7] [--code-rate 6.5]

Serves the default model on two instances of one core each: as 1 prefill + 1 decode and as 2 colocated for good, then
with ``--replan act`` from 1 prefill + 1 decode, to the same requests. Lengths are those of Azure's traces of 2023, in
order, prompts a twelfth and answers a sixteenth as long, so that a small model serves enough requests for the tests of
a move. Arrivals are Poisson's: in a slice this short, one burst would decide. Takes two cores, and three times three
phases of ``--seconds``.
"""

import argparse
import random
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from disagg.base.elastic_settings import Replan
from disagg.bench.client.load_plan import LoadPlan, OpenLoad, Server
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.run_load import LoadResult, run_load
from disagg.bench.compare.server_process import running, serve_command
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.statistics import Percentiles
from disagg.measure.trace import Trace
from disagg.measure.workload import RequestSpec
from disagg.scheduling.replan.placements import RoleCounts
from replan import LONGEST

START = RoleCounts(prefill=1, decode=1)
OTHER = RoleCounts(colocated=2)
DECIDED = re.compile(r"^(\d\d):(\d\d):(\d\d) .*: re-planning: (.*)$", re.MULTILINE)
DAY_S = 24 * 3600


def phases(arguments: argparse.Namespace) -> Iterator[RequestSpec]:
    """Yield chat, code and chat again: lengths in the order of the traces, arrivals by chance, at even rates."""
    draw = random.Random(1)
    chat, code = (Trace(arguments.traces / f"azure2023_{name}.jsonl.gz").rows() for name in ("conv", "code"))
    order = ((chat, arguments.chat_rate), (code, arguments.code_rate), (chat, arguments.chat_rate))
    for number, (rows, rate) in enumerate(order):
        time_s = draw.expovariate(rate)
        while time_s < arguments.seconds:
            row = next(one for one in rows if one.prompt_len + one.output_len <= LONGEST)
            yield RequestSpec(
                prompt_len=max(16, row.prompt_len // 12),
                output_len=max(2, row.output_len // 16),
                arrival_s=number * arguments.seconds + time_s,
            )
            time_s += draw.expovariate(rate)


def serve(
    counts: RoleCounts, replan: Replan, slo: Slo, requests: list[RequestSpec], more: list[str]
) -> tuple[LoadResult, list[str]]:
    """Serve all requests; return what came, and what was decided when."""
    roles = [word for role, count in counts.by_role().items() if count for word in (f"--{role.value}", str(count))]
    settings = ["--threads", "1", "--kv-memory", "512MiB", "--slo", str(slo), "--replan", replan.value, *more]
    command = serve_command("replan", [*roles, *settings])
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(command, log):
            plan = LoadPlan(server=Server(command.url), load=OpenLoad(requests), prompt_seed=1, num_warmup=8)
            result = run_load(plan, load_prompt_source())
        return result, decisions(log.read_text(), result.started_unix_s)


def decisions(log: str, started_unix_s: float) -> list[str]:
    """Return what a server's log says of plans, with seconds since the start of the run."""
    started = time.localtime(started_unix_s)
    started_s = 3600 * started.tm_hour + 60 * started.tm_min + started.tm_sec
    found = []
    for hours, minutes, seconds, words in DECIDED.findall(log):
        time_s = (3600 * int(hours) + 60 * int(minutes) + int(seconds) - started_s) % DAY_S
        found.append(f"{time_s:5.0f} s  {words}")
    return found


def row(name: str, records: tuple[RequestRecord, ...], slo: Slo, seconds: float) -> str:
    """Return attainment of all and of each phase, and the latencies of each."""
    parts = [
        [record for record in records if number * seconds <= record.due_s < (number + 1) * seconds]
        for number in range(3)
    ]
    kept = [sum(record.meets(slo) for record in part) / len(part) for part in (records, *parts)]
    times = [
        f"{1e3 * Percentiles.of([one.ttft_s for one in part]).p50:,.0f} ms, "
        f"{1e3 * Percentiles.of([one.tpot_s for one in part]).p50:.1f} ms"
        for part in parts
    ]
    return f"| {' | '.join([name, *(f'{part:.1%}' for part in kept), *times])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--seconds", type=float, default=45.0, help="length of each phase")
    parser.add_argument("--chat-rate", type=float, default=7.0)
    parser.add_argument("--code-rate", type=float, default=6.5)
    parser.add_argument("--slo", type=parse_slo, default="ttft=1500ms,tpot=30ms")
    parser.add_argument("--only", choices=["fixed", "act"], help="leave out the others")
    parser.add_argument("--serve", nargs="*", default=[], help="further flags of disagg serve")
    arguments = parser.parse_args()
    requests = list(phases(arguments))
    print(f"{len(requests)} requests, {arguments.slo}")
    print("| placement | all | chat | code | chat again | TTFT and TPOT, P50: chat | code | chat again |")
    print("|---|---|---|---|---|---|---|---|")
    runs = [(START, Replan.OFF), (OTHER, Replan.OFF)] if arguments.only != "act" else []
    runs += [(START, Replan.ACT)] if arguments.only != "fixed" else []
    for counts, replan in runs:
        result, decided = serve(counts, replan, arguments.slo, requests, arguments.serve)
        name = str(counts) if replan is Replan.OFF else f"`act`, from {counts}"
        print(row(name, result.records, arguments.slo, arguments.seconds), flush=True)
        failed = sum(record.ending is not Ending.FINISHED for record in result.records)
        for words in (*decided, *result.client_faults(), *([f"{failed} requests failed"] if failed else [])):
            print("   ", words, flush=True)


if __name__ == "__main__":
    main()
