"""What Ray costs a server: ``python benchmarks/ray_cost.py``, on an idle machine with Ray installed.

Starts one prefill and one decode instance of the default model, first as ``disagg serve`` starts them itself, then with
``--cluster`` on a Ray cluster of a head and two nodes on this host. Prints the time from the command to ``/ready``, and
what all processes beside the engines take of CPU and memory while nothing is asked of them.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from disagg.bench.compare.server_process import running, serve_command

COMMON: Final = ("--prefill", "1", "--decode", "1", "--threads", "1", "--kv-memory", "256MiB")
STORE_BYTES: Final = 80 << 20


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[psutil.Process, float]]:
    """Run a server; give its process, and the seconds that it took to take requests."""
    with tempfile.TemporaryDirectory() as folder:
        with running(serve_command("server", (*COMMON, *arguments)), Path(folder) / "log") as server:
            yield psutil.Process(server.process.pid), server.start_s


def family(*roots: psutil.Process) -> list[psutil.Process]:
    """Return processes with all that they started."""
    return [one for root in roots for one in (root, *root.children(recursive=True))]


def is_engine(process: psutil.Process) -> bool:
    return "disagg.engine" in process.cmdline()


def idle_cost(processes: Sequence[psutil.Process], seconds: float) -> tuple[float, float]:
    """Return the share of one core that processes take while nothing happens, and their memory in MiB (PSS)."""
    before = sum(sum(one.cpu_times()[:2]) for one in processes)
    time.sleep(seconds)
    after = sum(sum(one.cpu_times()[:2]) for one in processes)
    memory = sum(one.memory_full_info().pss for one in processes)
    return (after - before) / seconds, memory / (1 << 20)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle-s", type=float, default=20.0, help="seconds of idleness that are measured")
    seconds = parser.parse_args().idle_s
    table = Table("instances started by", "seconds to /ready", "idle: share of a core", "memory beside engines, MiB")
    with serving() as (server, ready_s):
        share, memory = idle_cost([one for one in family(server) if not is_engine(one)], seconds)
        table.add_row("disagg itself", f"{ready_s:.1f}", f"{share:.1%}", f"{memory:.0f}")
    began_s = time.monotonic()
    store = {"object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **store})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, **store)
        up_s = time.monotonic() - began_s
        rays = family(*psutil.Process().children())
        share, memory = idle_cost(rays, seconds)
        table.add_row("(Ray alone: a head, two nodes)", f"{up_s:.1f} to come up", f"{share:.1%}", f"{memory:.0f}")
        with (
            tempfile.TemporaryDirectory() as keys,
            serving("--cluster", f"ray://{cluster.address}", "--keys", keys) as (server, ready_s),
        ):
            everything = {one.pid: one for one in family(*psutil.Process().children(), server)}.values()
            share, memory = idle_cost([one for one in everything if not is_engine(one)], seconds)
            table.add_row("Ray, all of it", f"{ready_s:.1f}", f"{share:.1%}", f"{memory:.0f}")
    finally:
        cluster.shutdown()
    Console().print(table)


if __name__ == "__main__":
    main()
