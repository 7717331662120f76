"""A server whose instances Ray places, on a cluster of several raylets on this host; a node of it is killed."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_process import ServerProcess, serving
from test_lifecycle import wait_for
from test_rolling_upgrade import EXACT, STREAMS, tokens, under_load, wait_ready

pytest.importorskip("ray", reason="Ray is not installed (pip install 'disagg[ray]')")

STORE_BYTES = 80 << 20


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs, and three nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    try:
        for _ in range(3):
            made.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        yield made
    finally:
        made.shutdown()


def node_of(server: ServerProcess, instance: str) -> str:
    """The id of the node on which an instance was placed last."""
    return re.findall(rf"{instance} is placed on \S+ \(node (\w+)\)", server.text)[-1]


def kill_node(cluster: Any, node_id: str) -> None:
    (node,) = (one for one in cluster.list_all_nodes() if one.node_id == node_id)
    cluster.remove_node(node, allow_graceful=False)


@pytest.mark.slow
@pytest.mark.parametrize("routers", [(), ("--routers", "2")], ids=["one", "two"])
def test_ray_places_instances_and_places_them_anew_when_a_node_is_lost(
    cluster: Any, tmp_path: Path, tiny_model: Callable[..., Path], routers: tuple[str, ...]
) -> None:
    model = str(tiny_model("llama"))
    keys = ("--keys", str(tmp_path / "keys"), "--listen-instances", "127.0.0.1:0", "--instance-wait-s", "120")
    with serving(model, *EXACT, *keys, "--cluster", f"ray://{cluster.address}", *routers) as server:
        wait_ready(server, "prefill-0", "decode-0")
        lost = node_of(server, "decode-0")
        assert node_of(server, "prefill-0") != lost, "they are spread"

        added = httpx.post(f"{server.url}/admin/instances", json={"role": "decode"}).json()
        assert added["instance"] == "decode-1"
        wait_ready(server, "prefill-0", "decode-0", "decode-1")
        freed = node_of(server, "decode-1")
        httpx.post(f"{server.url}/admin/instances/decode-1/remove")
        wait_ready(server, "prefill-0", "decode-0")

        expected = [tokens(server, number) for number in range(STREAMS)]

        with under_load(server, expected):
            wait_for(lambda: server.metric("vllm:num_requests_running", role="decode") > 0, "an answer under way")
            kill_node(cluster, lost)
            wait_for(lambda: node_of(server, "decode-0") == freed, "the only place that is left")
            wait_ready(server, "prefill-0", "decode-0")
        assert "decode-0 is gone: Ray lost it" in server.text
        assert server.metric("disagg:instance_losses_total", instance="decode-0") == 1
        assert server.end() == 0
