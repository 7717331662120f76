"""A placement as Kubernetes manifests of vLLM instances: a Deployment and a Service for each node, unit and role."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

import yaml

from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.layout import PlacedInstance
from disagg.placement.vllm_commands import vllm_arguments

IMAGE: Final = "vllm/vllm-openai:v0.33.0"
_PORT: Final = 8000
_SIDE_PORT: Final = 5600
_LABELS: Final = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.COLOCATED: "prefill-decode"}
"""Values of ``llm-d.ai/role``, by which llm-d's router tells instances."""


def k8s_manifests(placed: Sequence[PlacedInstance], model: str) -> str:
    """Return the manifests as YAML documents. Raises ConfigurationError for an instance on several nodes."""
    for one in placed:
        nodes = dict.fromkeys(device.node for device in one.place)
        if len(nodes) > 1:
            raise ConfigurationError(
                f"{one.choice} is on {', '.join(nodes)}, and a pod has one node: plan with --max-nodes 1, or take --as "
                "vllm"
            )
    head = (
        "# Instances of vLLM. In front goes a router that knows phases, such as llm-d's: it selects by llm-d.ai/role.\n"
    )
    return head + yaml.safe_dump_all(_manifests(placed, model), sort_keys=False)


def _manifests(placed: Sequence[PlacedInstance], model: str) -> Iterator[dict[str, Any]]:
    def key(one: PlacedInstance) -> tuple[int, str, tuple[str, str, int, int, str]]:
        return one.unit, one.place[0].node, one.choice.order

    for (unit, node, _), members in groupby(sorted(placed, key=key), key=key):
        instances = list(members)
        yield from _group(instances[0], unit, node, len(instances), model)


def _group(one: PlacedInstance, unit: int, node: str, count: int, model: str) -> Iterator[dict[str, Any]]:
    choice = one.choice
    where = f"unit-{unit}" if unit >= 0 else "extra"
    name = f"{where}-{choice.role.value}-tp{choice.tensor_parallel}-{node}".lower().replace("_", "-").replace(".", "-")
    labels = {"app": name, "llm-d.ai/role": _LABELS[choice.role], "disagg/unit": where}
    pod = {
        "nodeSelector": {"kubernetes.io/hostname": node},
        "containers": [_container(one, choice, model)],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    yield {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "replicas": count,
            "selector": {"matchLabels": {"app": name}},
            "template": {"metadata": {"labels": dict(labels)}, "spec": pod},
        },
    }
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {"selector": {"app": name}, "ports": [{"port": _PORT, "targetPort": _PORT}]},
    }


def _container(one: PlacedInstance, choice: InstanceChoice, model: str) -> dict[str, Any]:
    address = {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    port = {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(_SIDE_PORT)}
    return {
        "name": "vllm",
        "image": IMAGE,
        "args": [*vllm_arguments(one, model), "--host", "0.0.0.0", "--port", str(_PORT)],
        "env": [] if choice.role is Role.COLOCATED else [address, port],
        "ports": [{"containerPort": _PORT}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": _PORT}, "periodSeconds": 10, "failureThreshold": 180},
        "resources": {"limits": {"nvidia.com/gpu": choice.num_devices}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
