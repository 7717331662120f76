"""What KV management saves, on traces: ``python benchmarks/cache.py --traces FOLDER``.

Replays Mooncake's conversations and its synthetic trace, and sessions of coding agents of up to 128k tokens, in the
simulator: Llama-70B's shape on H200 (roofline), two prefill and two decode instances of four devices each. The rows go
from the blind dispatch of prompts alone to all there is. ``computed`` is the part of the prompts' tokens that was
computed, ``of bound`` what was not computed as a part of what an endless cache for all instances together would have
spared. Rates are chosen so that blind dispatch can just bear them. ``agents_1m`` are the same sessions of agents with
all lengths times eight, up to a million tokens, on instances of eight devices.

``--goodput`` searches, for blind dispatch, for all without tiers and for all there is, the highest rate at which 90% of
the requests keep both objectives, and the lowest at which they do not, 2% apart as in every search.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from disagg.base.cache_routing import CacheRouting
from disagg.base.config import (
    CacheSettings,
    InstanceGroup,
    Placement,
    RouterSettings,
    SchedulerSettings,
)
from disagg.base.ids import BlockHash
from disagg.base.request import Role
from disagg.costs.devices import find_device
from disagg.costs.roofline import RooflinePlatform
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.goodput_search import RateBracket, bracket_goodput
from disagg.measure.open_loop import LengthLimits, OpenLoop
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo, parse_slo
from disagg.measure.trace import Trace
from disagg.models.config import Architecture, ModelConfig
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.run_report import RunReport
from disagg.simulator.session_load import SimulatedSessions
from disagg.simulator.simulated_requests import simulated_requests
from disagg.simulator.simulation import TargetLostError, simulate

LLAMA_70B: Final = ModelConfig(
    architecture=Architecture.LLAMA,
    vocab_size=128_256,
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500_000.0,
    rotary_dim=128,
    attention_scale=128**-0.5,
    max_position_embeddings=131_072,
    sliding_windows=(None,) * 80,
    tie_word_embeddings=False,
)
SLO: Final = parse_slo("ttft=5s,tpot=100ms")
TARGET: Final = 0.9
"""Part of the requests that are to keep both objectives at the goodput."""
MOST_DOUBLINGS: Final = 8
"""Of the rate, in a search: by then a trace's sessions all begin in seconds, and no rate is too high for them."""


@dataclass(frozen=True)
class Variant:
    """What is switched on. Without ``answers`` a request's names end with its prompt."""

    name: str
    routing: CacheRouting
    answers: bool = True
    append_turns: bool = False
    disk: str | None = None
    host_bytes: int | None = None


VARIANTS: Final = (
    Variant("blind, prompts alone", CacheRouting.BLIND, answers=False),
    Variant("blind, answers too", CacheRouting.BLIND),
    Variant("affinity", CacheRouting.AFFINITY),
    Variant("and pulled", CacheRouting.PULL),
    Variant("and appended", CacheRouting.PULL, append_turns=True),
    Variant("and 16 TiB of disk", CacheRouting.PULL, append_turns=True, disk="/,16TiB"),
    Variant("and 1 TiB of host memory each", CacheRouting.PULL, append_turns=True, disk="/,16TiB", host_bytes=1 << 40),
)
COMPARED: Final = (VARIANTS[1], VARIANTS[4], VARIANTS[6])
"""Those whose goodput is searched."""


@dataclass(frozen=True)
class Load:
    """One trace, an open loop of requests or sessions, its objectives, and what an instance is."""

    name: str
    workload: OpenLoop | SessionWorkload
    slo: Slo = SLO
    num_devices: int = 4
    block_size: int = 64

    @property
    def placement(self) -> Placement:
        """Two prefill and two decode instances."""
        roles = (Role.PREFILL, Role.DECODE)
        return Placement(
            groups=tuple(InstanceGroup(role=role, count=2, tensor_parallel=self.num_devices) for role in roles)
        )


def loads(folder: Path, count: int | None) -> Iterator[Load]:
    """Yield the traces, or the first ``count`` requests (a thirtieth of it as sessions) of each."""
    for name, rate in (("mooncake_conversation", 1.2), ("mooncake_synthetic", 1.4)):
        source = Trace(folder / f"{name}.jsonl.gz", count)
        # The file rounds times to batches of 3 s.
        arrivals = Arrivals(ArrivalKind.REPLAY, rate, batch_s=3.0)
        yield Load(name, OpenLoop(source, arrivals, LengthLimits(max_total_len=131_072)))
    num_sessions = None if count is None else max(1, count // 30)
    sessions = SessionWorkload(
        folder / "agent_coding_128k.jsonl.gz", 0.05, num_sessions=num_sessions, max_total_len=131_072
    )
    yield Load("agent_coding_128k", sessions)
    long = replace(
        sessions,
        rate=0.004,
        num_sessions=None if num_sessions is None else max(1, num_sessions // 4),
        length_factor=8.0,
        max_total_len=2**20,
    )
    yield Load("agents_1m", long, parse_slo("ttft=30s,tpot=100ms"), num_devices=8, block_size=512)


class Bound:
    """Counts what a cache without end, shared by all, would have to compute."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._known: set[BlockHash] = set()
        self.num_computed = 0

    def add(self, request: SimulatedRequest) -> None:
        """Take a request in the order of arrival."""
        names = request.block_hashes
        num_known = 0
        for name in names[: (request.prompt_len - 1) // self._block_size]:
            if name not in self._known:
                break
            num_known += self._block_size
        self.num_computed += request.prompt_len - num_known
        self._known.update(names)


def run(spec: ClusterSpec, load: Load, variant: Variant, most_misses: float = math.inf) -> tuple[RunReport, Bound]:
    """Serve a trace; return the report and the bound for what arrived. Raises TargetLostError as ``simulate`` does."""
    block_size = spec.instances[0].block_size
    bound = Bound(block_size)

    def seen(request: SimulatedRequest) -> SimulatedRequest:
        bound.add(request)
        if not variant.answers:
            request.block_hashes = request.prompt_names(block_size)
        return request

    workload = load.workload
    if isinstance(workload, OpenLoop):
        requests = simulated_requests(workload.draw(0), workload.name, block_size)
        return simulate(spec, map(seen, requests), load.slo, most_misses=most_misses), bound
    sessions = SimulatedSessions(workload.draw(0), block_size)

    def following(ended: SimulatedRequest) -> SimulatedRequest | None:
        request = sessions.next_call(ended)
        return None if request is None else seen(request)

    first = map(seen, sessions.first_calls())
    return simulate(spec, first, load.slo, next_call=following, most_misses=most_misses), bound


def build(load: Load, variant: Variant) -> ClusterSpec:
    """Return the cluster that serves a load in this way."""
    rules = own_rules(
        SchedulerSettings(max_batch_tokens=8192, max_batch_size=256),
        cache=CacheSettings(kv_disk=variant.disk, kv_host_memory_bytes=variant.host_bytes, block_size=load.block_size),
        router=RouterSettings(
            cache_routing=variant.routing,
            append_turns=variant.append_turns,
            max_queued_requests=10**6,
            request_timeout_s=1e6,
        ),
    )
    return build_cluster(load.placement, RooflinePlatform(LLAMA_70B, find_device("h200-sxm"), "Llama-70B"), rules)


def goodput(load: Load, variant: Variant) -> RateBracket:
    """Return the rates, of requests or of sessions, between which the target is lost."""
    spec, workload = build(load, variant), load.workload
    if isinstance(workload, OpenLoop):
        num_requests = len(workload.source)
    else:
        num_requests = sum(len(session.calls) for session in workload.draw(0))
    most_misses = (1 - TARGET) * num_requests

    def keeps(rate: float) -> bool:
        try:
            report, _ = run(spec, replace(load, workload=workload.at_rate(rate)), variant, most_misses)
        except TargetLostError:
            return False
        return report.attainment >= TARGET

    return bracket_goodput(keeps, workload.rate, growth=1.2, max_doublings=MOST_DOUBLINGS)


def rows(load: Load, variants: Sequence[Variant]) -> Iterator[tuple[str, ...]]:
    """Yield what each variant comes to."""
    for variant in variants:
        report, bound = run(build(load, variant), load, variant)
        tokens = report.prompt_tokens
        spared = tokens.total - bound.num_computed
        yield (
            variant.name,
            f"{tokens.computed / tokens.total:.1%}",
            f"{(tokens.total - tokens.computed) / spared:.2f}" if spared else "-",
            *(
                f"{count / tokens.total:.1%}"
                for count in (tokens.cached, tokens.pulled, tokens.from_host, tokens.loaded)
            ),
            f"{report.ttft.p50:.2f}",
            f"{report.ttft.p90:.2f}",
            f"{report.tpot.p90 * 1e3:.0f}",
            f"{report.attainment:.1%}",
        )


def main() -> None:
    """Print a table for each trace."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    parser.add_argument("--requests", type=int, help="only the first N requests of each")
    parser.add_argument("--only", help="one trace")
    parser.add_argument("--rows", default="", help="only the rows with this in their name")
    parser.add_argument("--goodput", action="store_true", help="search the goodput instead")
    options = parser.parse_args()
    console = Console(highlight=False, width=140)
    for load in loads(options.traces, options.requests):
        if options.only not in (None, load.name):
            continue
        if options.goodput:
            for variant in (one for one in COMPARED if options.rows in one.name):
                found = goodput(load, variant)
                console.print(
                    f"{load.name}: {variant.name:32} goodput {found.met:.4g}-{found.missed:.4g}/s, {load.slo}"
                )
            continue
        table = Table(box=None, pad_edge=False, title=f"{load.name}, {load.slo}")
        table.add_column("", no_wrap=True)
        headings = (
            "computed",
            "of bound",
            "cached",
            "pulled",
            "host",
            "disk",
            "TTFT P50 s",
            "P90",
            "TPOT P90 ms",
            "kept",
        )
        for heading in headings:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in rows(load, [variant for variant in VARIANTS if options.rows in variant.name]):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    main()
