"""Plans as start commands of vLLM and as Kubernetes manifests."""

import json
import shlex

import kubernetes_validate
import pytest
import yaml
from planning import EvenPlatform, nodes, problem, topology

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.placement.composition import Composition, Family
from disagg.placement.instance_choice import BatchLimits, InstanceChoice
from disagg.placement.k8s_manifests import k8s_manifests
from disagg.placement.layout import PlacedInstance, lay_out
from disagg.placement.vllm_commands import vllm_instances, vllm_script

PREFILL = InstanceChoice(Role.PREFILL, "gpu", 2, 1, BatchLimits(None, 2048, 64))
DECODE = InstanceChoice(Role.DECODE, "gpu", 1)
COLOCATED = InstanceChoice(Role.COLOCATED, "gpu", 1)


@pytest.fixture(scope="module")
def placed() -> list[PlacedInstance]:
    """Two nodes of four devices, a unit on each, and a colocated instance on what is left."""
    one = problem(topology=topology(nodes(2, 4)), platforms={"gpu": EvenPlatform()})
    unit = ((PREFILL, 1), (DECODE, 1))
    return lay_out(one, Composition(Family.MIXED, unit, 2, nodes_per_unit=1, extra=((COLOCATED, 1),)))


def test_every_instance_gets_its_devices_and_ports(placed: list[PlacedInstance]) -> None:
    script = vllm_script(placed, "org/model")
    assert script.count("vllm serve org/model") == 5
    assert "CUDA_VISIBLE_DEVICES=0,1" in script
    instances = vllm_instances(placed)
    assert len({one.port for one in instances}) == len({one.side_port for one in instances}) == 5


def test_both_phases_transfer_kv_and_colocated_ones_do_not(placed: list[PlacedInstance]) -> None:
    lines = [line for line in vllm_script(placed, "m").splitlines() if line.startswith("vllm serve")]
    configs = [shlex.split(line) for line in lines]
    transfers = [
        json.loads(words[words.index("--kv-transfer-config") + 1])
        for words in configs
        if "--kv-transfer-config" in words
    ]
    assert len(transfers) == 4
    assert {one["kv_connector"] for one in transfers} == {"NixlConnector"}
    assert sum("--max-num-batched-tokens 2048" in line for line in lines) == 2


def test_each_unit_has_a_proxy_of_its_own(placed: list[PlacedInstance]) -> None:
    proxies = [shlex.split(line) for line in vllm_script(placed, "m").splitlines() if line.startswith("python")]
    assert len(proxies) == 2
    for proxy in proxies:
        prefill, decode = (proxy[proxy.index(flag) + 1] for flag in ("--prefiller-hosts", "--decoder-hosts"))
        assert prefill == decode, "a unit on one node"


def test_manifests_are_of_kubernetes_kinds(placed: list[PlacedInstance]) -> None:
    documents = list(yaml.safe_load_all(k8s_manifests(placed, "org/model")))
    for one in documents:
        kubernetes_validate.validate(one, "1.37", strict=True)
    deployments = [one for one in documents if one["kind"] == "Deployment"]
    assert len(deployments) == 5
    assert len({one["metadata"]["name"] for one in deployments}) == 5
    assert {one["metadata"]["labels"]["llm-d.ai/role"] for one in deployments} == {
        "prefill",
        "decode",
        "prefill-decode",
    }
    gpus = [
        one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] for one in deployments
    ]
    assert sorted(gpus) == [1, 1, 1, 2, 2]


def test_a_pod_has_one_node() -> None:
    one = problem(topology=topology(nodes(2, 1)), platforms={"gpu": EvenPlatform()})
    wide = Composition(Family.COLOCATED, ((InstanceChoice(Role.COLOCATED, "gpu", 1, 2), 1),), 1)
    with pytest.raises(ConfigurationError, match="a pod has one node"):
        k8s_manifests(lay_out(one, wide), "m")
    assert "ray start --head" in vllm_script(lay_out(one, wide), "m")
