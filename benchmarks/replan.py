"""Re-planning on a trace that turns from chat to code and back: what `act` keeps, beside every fixed placement.

    python benchmarks/replan.py ../shared/data/traces [--start 1,3,0] [--minutes 5] [--chat-rate 7] [--code-rate 4]

The slices are Azure's production traces of 2023, stretched to the rates. All is simulated, with the same policies as
live: Llama 3 8B on L40S devices by their data sheet. `--stationary` serves the chat alone, for as long.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

from disagg.base.config import CacheSettings, InstanceGroup, Placement, RouterSettings, SchedulerSettings
from disagg.base.elastic_settings import Replan
from disagg.costs.devices import find_device
from disagg.costs.platform import Platform
from disagg.costs.roofline import RooflinePlatform
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.trace import Trace
from disagg.measure.workload import RequestSpec
from disagg.models.known_shapes import KNOWN_SHAPES
from disagg.placement.replanning import answer_question
from disagg.scheduling.replan.placements import RoleCounts
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.simulated_requests import simulated_requests

LONGEST = 8000


def phases(arguments: argparse.Namespace) -> Iterator[RequestSpec]:
    """Yield chat, code and chat again, each for so many minutes."""
    chat, code = ("azure2023_conv", arguments.chat_rate), ("azure2023_code", arguments.code_rate)
    order = [chat, chat, chat] if arguments.stationary else [chat, code, chat]
    length_s = 60 * arguments.minutes
    first: dict[str, int] = {}
    for number, (name, rate) in enumerate(order):
        trace = Trace(arguments.traces / f"{name}.jsonl.gz", round(rate * length_s), first=first.get(name, 0))
        first[name] = first.get(name, 0) + len(trace)
        for row in trace.rows():
            if row.prompt_len + row.output_len <= LONGEST:
                yield replace(row, arrival_s=number * length_s + row.arrival_s * trace.rate / rate, line=0)


def placement_of(counts: RoleCounts) -> Placement:
    groups = [InstanceGroup(role=role, count=count) for role, count in counts.by_role().items() if count]
    return Placement(groups=tuple(groups))


def serve(
    counts: RoleCounts, replan: Replan, platform: Platform, slo: Slo, requests: list[RequestSpec]
) -> tuple[list[SimulatedRequest], list[str]]:
    """Return the requests as they ended, and what was decided."""
    scheduler = SchedulerSettings(objectives=slo.objectives(), max_batch_tokens=2048)
    router = RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, replan=replan)
    cache = CacheSettings(kv_memory_bytes=24 << 30, prefix_caching=False)
    cluster = build_cluster(placement_of(counts), platform, own_rules(scheduler, cache, router))
    ended: list[SimulatedRequest] = []
    simulated = SimulatedCluster(replace(cluster, planner=answer_question), ended.append)
    simulated.run(simulated_requests(requests, "azure", cache.block_size))
    return ended, [f"{time_s:5.0f} s  {decided.words}" for time_s, decided in simulated.decisions]


def kept(requests: list[SimulatedRequest], slo: Slo, begin_s: float = 0.0, end_s: float = math.inf) -> float:
    """Return the attainment of those that arrive in a span of time."""
    counted = [one for one in requests if begin_s <= one.arrival_s < end_s]
    return sum(slo.is_met(one.ttft_s, one.tpot_s) for one in counted) / len(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", type=Path)
    parser.add_argument("--start", default="1,3,0", help="prefill, decode, colocated at the start")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--chat-rate", type=float, default=7.0)
    parser.add_argument("--code-rate", type=float, default=4.0)
    parser.add_argument("--slo", type=parse_slo, default="ttft=1s,tpot=40ms")
    parser.add_argument("--stationary", action="store_true", help="chat alone")
    parser.add_argument("--no-fixed", action="store_true", help="act alone")
    arguments = parser.parse_args()
    platform = RooflinePlatform(KNOWN_SHAPES["llama-3-8b"], find_device("l40s"), "llama-3-8b")
    requests = list(phases(arguments))
    start = RoleCounts(*map(int, arguments.start.split(",")))
    print(f"{len(requests)} requests, {arguments.slo}, {start.total} instances")
    print("| placement | all | first | second | third |\n|---|---|---|---|---|")
    fixed = [
        RoleCounts(prefill, decode, start.total - prefill - decode)
        for prefill, decode in product(range(start.total + 1), repeat=2)
        if prefill + decode <= start.total and bool(prefill) == bool(decode)
    ]
    for counts, replan in [(one, Replan.OFF) for one in fixed if not arguments.no_fixed] + [(start, Replan.ACT)]:
        ended, decisions = serve(counts, replan, platform, arguments.slo, requests)
        length_s = 60 * arguments.minutes
        parts = [kept(ended, arguments.slo, number * length_s, (number + 1) * length_s) for number in range(3)]
        name = str(counts) if replan is Replan.OFF else f"{replan.value}, from {counts}"
        cells = [name, *(f"{part:.1%}" for part in (kept(ended, arguments.slo), *parts))]
        print(f"| {' | '.join(cells)} |", flush=True)
        for words in decisions if replan is Replan.ACT else []:
            print("   ", words)


if __name__ == "__main__":
    main()
