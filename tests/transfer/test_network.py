"""KV blocks over a network with real addresses: a namespace stands for the other host, a veth pair for the cable."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from link_contract import Ended, Ends, pairs, small_layout
from owner_process import PEER_LAYOUT, OwnerProcess

from disagg.base.clock import MonotonicClock
from disagg.transfer.link import KvRead, TransferState
from disagg.transfer.links import Links
from disagg.transfer.pool import KvPool

NAME = f"disagg{os.getpid()}"
HERE, THERE = "198.18.93.1", "198.18.93.2"


def ip(arguments: str) -> None:
    done = subprocess.run(["ip", *arguments.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"network namespaces are not allowed here: ip {arguments}: {done.stderr.strip()}")


@pytest.fixture
def other_host() -> Iterator[str]:
    """The name of a namespace with the address ``THERE``."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    try:
        ip(f"netns add {NAME}")
        ip(f"link add {NAME[-8:]}v type veth peer name cable netns {NAME}")
        ip(f"addr add {HERE}/30 dev {NAME[-8:]}v")
        ip(f"link set {NAME[-8:]}v up")
        ip(f"-n {NAME} addr add {THERE}/30 dev cable")
        ip(f"-n {NAME} link set cable up")
        yield NAME
    finally:
        subprocess.run(["ip", "netns", "del", NAME], capture_output=True, check=False)


def test_a_cable_that_is_pulled_costs_the_read_and_the_next_one_works(other_host: str) -> None:
    with ExitStack() as stack:
        owner = OwnerProcess("bb", "tcp", THERE, ("ip", "netns", "exec", other_host))
        stack.callback(owner.kill)
        pool = KvPool(small_layout(num_blocks=8), "cc")
        stack.callback(pool.close)
        threads = stack.enter_context(ThreadPoolExecutor(max_workers=1))
        links = Links(pool, threads, MonotonicClock())
        stack.callback(links.close)
        ends = Ends(links.open(owner.address), pool, PEER_LAYOUT, owner.close_pool, owner.access)
        blocks = pairs((0, 5), (9, 2))
        assert ends.read(blocks, digests=ends.digests(0, 9)).state is TransferState.DONE

        ip(f"-n {other_host} link set cable down")  # no FIN, no reset: nothing comes any more
        ended = Ended()
        ends.link.read(KvRead(blocks, range(3), access=owner.access, timeout_s=0.5), ended)
        assert "took longer than the lease" in ended.wait().failure
        ip(f"-n {other_host} link set cable up")
        assert ends.read(blocks, digests=ends.digests(0, 9)).state is TransferState.DONE
