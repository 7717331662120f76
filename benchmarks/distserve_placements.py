"""DistServe's published placements beside ours: ``python benchmarks/distserve_placements.py [LENGTHS]``.

For each deployment of the paper (table 3; that of 13B is also what its repository finds), plans with DistServe's rules
and objectives, and judges the published placement beside, with the same requests. Prints both, with the rate for each
device at which nine requests in ten keep the objectives. LENGTHS is a file of ShareGPT's lengths; HumanEval and
LongBench are requests of the mean lengths of the paper. OPT-175B has no published step times: its are those of the
roofline.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

LENGTHS: Final = Path("../shared/data/distserve/sharegpt_lengths.csv")
CLUSTER: Final = """\
nodes:
- {name: node, count: 4, device: a100-sxm, devices: 8}
network: {kind: tcp, bandwidth: 25 Gbit/s, latency: 50 us}
"""
"""The paper's testbed (section 6.1)."""
Parallelism = tuple[int, int]
"""Tensor and pipeline."""


@dataclass(frozen=True)
class Case:
    """A deployment of the paper: who is served, in which objectives, and the placement that it found."""

    name: str
    model: str
    slo: str
    prefill: Parallelism
    decode: Parallelism
    num_devices: int | None
    """Of the node that is planned for; None: the paper's cluster."""
    lengths: tuple[int, int] | None = None
    """Of each request; None: ShareGPT's."""
    latency: str = "published"


CASES: Final = (
    Case("13b", "opt-13b", "ttft=200ms,tpot=100ms@90%", (2, 1), (1, 1), 4),
    Case("66b", "opt-66b", "ttft=2.5s,tpot=150ms@90%", (4, 1), (2, 2), 8),
    Case("66b-longbench", "opt-66b", "ttft=15s,tpot=150ms@90%", (4, 1), (2, 2), 8, (1738, 91)),
    Case("66b-humaneval", "opt-66b", "ttft=125ms,tpot=200ms@90%", (4, 1), (2, 2), 8, (171, 98)),
    Case("175b", "opt-175b", "ttft=4s,tpot=200ms@90%", (3, 3), (4, 3), None, latency="a100-sxm"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lengths", nargs="?", type=Path, default=LENGTHS, help=f"default: {LENGTHS}")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES), help="default: %(default)s")
    given = parser.parse_args()
    names = given.cases.split(",")
    table = Table(title="Requests/s within the objectives, for each device")
    for heading in ("case", "ours", "goodput", "theirs, as we simulate it", "goodput", "its rank with us"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if case.name in names:
                table.add_row(case.name, *compare(case, given.lengths, Path(folder)))
    Console(width=140).print(table)


def compare(case: Case, lengths: Path, folder: Path) -> Sequence[str]:
    """Return our placement and its goodput, theirs and its goodput, and where theirs stands among ours."""
    flags = ["--engine", "distserve", "--model", case.model, "--latency", case.latency]
    if case.lengths is None:
        flags += ["--workload", str(lengths.resolve())]
    else:
        flags += ["--prompt-len", str(case.lengths[0]), "--output-len", str(case.lengths[1])]
    cluster = folder / "cluster.yaml"
    cluster.write_text(CLUSTER, encoding="utf-8")
    devices = ["--devices", str(case.num_devices)] if case.num_devices else ["--cluster", str(cluster)]
    placement = folder / "theirs.yaml"
    placement.write_text(json.dumps({"groups": theirs(case)}), encoding="utf-8")
    plan = run("plan", *devices, *flags, "--slo", case.slo, "--per", "device", "--beside", str(placement))
    best = plan["placements"][0]
    rank, found = next((number, one) for number, one in enumerate(plan["placements"], 1) if is_theirs(case, one))
    return (
        best["words"],
        f"{best['goodput_per_device']['mean']:.2f} ± {best['goodput_per_device']['half_width']:.2f}",
        f"prefill TP{case.prefill[0]} PP{case.prefill[1]}, decode TP{case.decode[0]} PP{case.decode[1]}",
        f"{found['goodput_per_device']['mean']:.2f}",
        str(rank),
    )


def theirs(case: Case) -> list[dict[str, object]]:
    """Return the published placement as groups of a placement file."""
    sizes = (("prefill", case.prefill), ("decode", case.decode))
    return [
        {"role": role, "count": 1, "tensor_parallel": tensor, "pipeline_parallel": pipeline}
        for role, (tensor, pipeline) in sizes
    ]


def is_theirs(case: Case, placement: Mapping[str, Any]) -> bool:
    """Return whether a planned placement is the published one, or several of it."""
    names = ("role", "tensor_parallel", "pipeline_parallel")
    found = {tuple(one[name] for name in names) for one in placement["instances"]}
    wanted = {tuple(one[name] for name in names) for one in theirs(case)}
    return found == wanted and len({one["count"] for one in placement["instances"]}) == 1


def run(*arguments: str) -> dict[str, Any]:
    """Run a command of disagg and return its JSON; end with its error."""
    command = [sys.executable, "-m", "disagg.cli.main", *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)}: {result.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(result.stdout)
    return found


if __name__ == "__main__":
    main()
