"""What a client sees of the hand-over of long prompts, in parts and whole, beside what the simulator says of it.

For each link and length: the gap between the first and the second token, less the median of the gaps after it, which is
what the hand-over costs a client; its share of the time to the first token; and the ratio of that gap to those after
it. Then, measured and simulated, the stages between the first token and the first decode step: the control path (until
the decode instance knows of the offer), the pull, and both with what is waited for between. Real servers, one request
at a time, the settings taking turns. The simulator has a profile of this machine, made first unless ``--profile`` names
one. ``--rate 1gbit`` holds the loopback interface to a rate (``tc tbf``; needs root, and a network namespace of its
own: run it behind ``unshare --net``); TCP is simulated at such a rate alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import httpx
import msgspec

from disagg.base.config import CacheSettings, InstanceGroup, Placement, SchedulerSettings
from disagg.base.ids import RequestId
from disagg.base.request import Role
from disagg.bench.compare.server_process import running, serve_command
from disagg.costs.cluster_file import LinkEntry
from disagg.costs.links import LinkKind, LinkModel
from disagg.costs.profile import Profile, load_profile
from disagg.costs.profiled_platform import ProfiledPlatform
from disagg.costs.topology import Topology
from disagg.measure.timeline import Stage
from disagg.simulator.cluster import ClusterSpec, SimulatedCluster
from disagg.simulator.engines import build_cluster, own_rules
from disagg.simulator.request import SimulatedRequest

NUM_TOKENS = 12
HAND_OVER = (Stage.HAND_OVER_CONTROL, Stage.HAND_OVER_WAIT, Stage.HAND_OVER, Stage.QUEUE_DECODE)
"""The stages between the first token and the first decode step."""
BETWEEN = (*HAND_OVER, Stage.FIRST_DECODE)
"""Those between the first and the second token."""


@dataclass(frozen=True)
class HandOver:
    """One hand-over, measured or simulated: seconds of the gaps after the first token, and of its stages."""

    gap_s: float
    later_gap_s: float
    control_s: float
    pull_s: float
    whole_s: float

    @classmethod
    def of(cls, stages: Mapping[Stage, float], gap_s: float, later_gap_s: float) -> "HandOver":
        """Take the stages of a request."""
        whole_s = sum(stages[stage] for stage in HAND_OVER)
        return cls(gap_s, later_gap_s, stages[Stage.HAND_OVER_CONTROL], stages[Stage.HAND_OVER], whole_s)

    @property
    def exposed_s(self) -> float:
        """What the second gap has more than those after it."""
        return max(0.0, self.gap_s - self.later_gap_s)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Medians of one length and setting, in seconds; what is simulated is None where that link is not."""

    link: str
    tokens: int
    overlap: bool
    ttft_s: float
    exposed_s: float
    gap_ratio: float
    control_s: float
    pull_s: float
    hand_over_s: float
    simulated_exposed_s: float | None
    simulated_control_s: float | None
    simulated_pull_s: float | None
    simulated_hand_over_s: float | None

    @property
    def error(self) -> float | None:
        """Of the simulated hand-over, as a part of the measured one."""
        return None if self.simulated_hand_over_s is None else self.simulated_hand_over_s / self.hand_over_s - 1


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """Run a server with one prefill and one decode instance; yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", arguments), Path(folder) / "log") as server:
            yield server.command.url


def token_times(url: str, num_tokens: int, salt: int) -> list[float]:
    """Send a prompt that nobody has cached; return the seconds from the request to each token."""
    prompt = [1000 + (salt * 7919 + position * 104_729) % 40_000 for position in range(num_tokens)]
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 0, "stream": True}
    body["model"] = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    started_s = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=600) as response:
        response.raise_for_status()
        return [time.perf_counter() - started_s for line in response.iter_lines() if line.startswith("data: {")]


def measured(url: str, num_tokens: int, salt: int) -> tuple[float, HandOver]:
    """Return the time to the first token of such a prompt, and its hand-over as client and server tell of it."""
    times = token_times(url, num_tokens, salt)
    gaps = [after - before for before, after in pairwise(times)]
    (last,) = httpx.get(f"{url}/requests", params={"after": -1}).json()["requests"]
    stages = {stage: last["stages"][stage.value] for stage in BETWEEN}
    return times[0], HandOver.of(stages, gaps[0], statistics.median(gaps[1:]))


def simulated(spec: ClusterSpec, num_tokens: int) -> HandOver:
    """Return what the simulator says of such a hand-over."""
    request = SimulatedRequest(RequestId("alone"), 0.0, num_tokens, NUM_TOKENS)
    SimulatedCluster(spec, lambda ended: None).run([request])
    stages = request.timeline.stages()
    return HandOver.of(stages, sum(stages[stage] for stage in BETWEEN), stages[Stage.DECODE] / (NUM_TOKENS - 2))


def deployment(profile: Profile, link: LinkModel, *, kv_overlap: bool) -> ClusterSpec:
    """Return what is served, for the simulator: a prefill and a decode instance of one thread each, and such a link."""
    roles = (Role.PREFILL, Role.DECODE)
    placement = Placement(groups=tuple(InstanceGroup(role=role, count=1, num_threads=1) for role in roles))
    platform = ProfiledPlatform(profile, CacheSettings().kv_memory_bytes)
    rules = own_rules(SchedulerSettings(kv_overlap=kv_overlap), CacheSettings(prefix_caching=False))
    return replace(build_cluster(placement, platform, rules), topology=Topology.one_node(link, len(roles)))


def link_of(name: str, rate: str | None, profile: Profile) -> LinkModel | None:
    """Return the link for the simulator, where it is known: as profiled, or a network of such a rate."""
    if name == LinkKind.SHM.value:
        return ProfiledPlatform(profile, 1).link
    if name != LinkKind.TCP.value or rate is None:
        return None
    bandwidth = rate.replace("bit", "bit/s").replace("g", "G").replace("m", "M")
    return LinkEntry(kind=LinkKind.TCP, bandwidth=bandwidth, latency=profile.link_latency_s).model()


def made_profile() -> Profile:
    """Profile this machine, in about a minute."""
    with tempfile.TemporaryDirectory(prefix="disagg-overlap-") as folder:
        path = Path(folder) / "profile.json"
        command = [sys.executable, "-m", "disagg.cli.main", "profile", "--quick", "--threads", "1", "-o", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return load_profile(path)


def compared(name: str, chosen: argparse.Namespace, profile: Profile) -> Iterator[Row]:
    """Measure hand-overs over one link, and simulate each."""
    common = ("--max-model-len", "8192", "--threads", "1", "--no-prefix-caching", "--kv-link", name)
    found: dict[tuple[int, bool], list[tuple[float, HandOver]]] = {}
    with serving(*common, "--kv-overlap") as on, serving(*common, "--no-kv-overlap") as off:
        for url in (on, off):
            token_times(url, 512, 0)
        for repeat in range(chosen.repeats):
            for length in chosen.lengths:
                for overlap, url in ((True, on), (False, off)):
                    found.setdefault((length, overlap), []).append(measured(url, length, 1 + repeat))
    link = link_of(name, chosen.rate, profile)
    for (length, overlap), told in found.items():
        foreseen = None if link is None else simulated(deployment(profile, link, kv_overlap=overlap), length)
        one = [hand_over for _, hand_over in told]
        yield Row(
            link=name if link is None or link.kind is LinkKind.SHM else f"{name} at {chosen.rate}",
            tokens=length,
            overlap=overlap,
            ttft_s=statistics.median(ttft_s for ttft_s, _ in told),
            exposed_s=statistics.median(each.exposed_s for each in one),
            gap_ratio=statistics.median(each.gap_s / each.later_gap_s for each in one),
            control_s=statistics.median(each.control_s for each in one),
            pull_s=statistics.median(each.pull_s for each in one),
            hand_over_s=statistics.median(each.whole_s for each in one),
            simulated_exposed_s=None if foreseen is None else foreseen.exposed_s,
            simulated_control_s=None if foreseen is None else foreseen.control_s,
            simulated_pull_s=None if foreseen is None else foreseen.pull_s,
            simulated_hand_over_s=None if foreseen is None else foreseen.whole_s,
        )


COLUMNS = (
    "link",
    "tokens",
    "overlap",
    "TTFT",
    "exposed",
    "of TTFT",
    "gap ratio",
    "control",
    "pull",
    "hand-over",
    "off by",
)


def cells(row: Row) -> Iterator[str]:
    """Yield what stands in each column; what is simulated stands behind a slash, times are in ms."""

    def both(measured_s: float, simulated_s: float | None) -> str:
        return f"{measured_s * 1e3:.1f} / {'-' if simulated_s is None else f'{simulated_s * 1e3:.1f}'}"

    yield from (row.link, str(row.tokens), "on" if row.overlap else "off", f"{row.ttft_s * 1e3:.0f}")
    yield from (both(row.exposed_s, row.simulated_exposed_s), f"{row.exposed_s / row.ttft_s:.1%}")
    yield from (f"{row.gap_ratio:.2f}", both(row.control_s, row.simulated_control_s))
    yield from (both(row.pull_s, row.simulated_pull_s), both(row.hand_over_s, row.simulated_hand_over_s))
    yield "-" if row.error is None else f"{row.error:+.0%}"


def main() -> None:
    """Print a row for each length and setting: what was measured, and behind a slash what is simulated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8000])
    parser.add_argument("--links", nargs="+", default=["shm", "tcp"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rate", help="such as 1gbit, for TCP")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="from disagg profile; else one is made")
    parser.add_argument("--json", action="store_true", help="one JSON line for each row, times in seconds")
    chosen = parser.parse_args()
    if chosen.rate:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        shape = f"tc qdisc replace dev lo root tbf rate {chosen.rate} burst 256kb latency 50ms"
        subprocess.run(shape.split(), check=True)
    profile = load_profile(chosen.profile) if chosen.profile else made_profile()
    if not chosen.json:
        print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name in chosen.links:
        for row in compared(name, chosen, profile):
            line = {**msgspec.to_builtins(row), "error": row.error}
            print(json.dumps(line) if chosen.json else f"| {' | '.join(cells(row))} |", flush=True)


if __name__ == "__main__":
    main()
