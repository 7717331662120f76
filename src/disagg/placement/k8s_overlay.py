"""A placement as an overlay of deploy/kubernetes: how many pods of which role, how large, told what."""

from collections.abc import Sequence
from typing import Any, Final

import yaml

from disagg.base.config import CacheSettings, InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.units import format_bytes

BASE: Final = "../../base"
"""Seen from a folder beside the other overlays."""
_BESIDE_KV: Final = 2 << 30
"""Memory of a pod for weights and process, in bytes: enough for models of some 700 million parameters in bfloat16."""
_CONTAINER: Final = "/spec/template/spec/containers/0"
_HEAD: Final = (
    "# A kustomization.yaml, for a folder of its own in deploy/kubernetes/overlays: kubectl apply -k that folder.\n"
)


def k8s_overlay(placement: Placement, cache: CacheSettings) -> str:
    """Return the kustomization of a placement whose instances have the KV pool of ``cache`` unless they say otherwise.

    Raises ConfigurationError for what the StatefulSets, one for each role, cannot be.
    """
    by_role = {role: _only_group(role, [one for one in placement.groups if one.role is role]) for role in Role}
    counts = [
        {"name": f"disagg-{role.value}", "count": 0 if group is None else group.count}
        for role, group in by_role.items()
    ]
    patches = [
        {
            "target": {"kind": "StatefulSet", "name": f"disagg-{role.value}"},
            "patch": yaml.safe_dump(_patch(group, cache), sort_keys=False),
        }
        for role, group in by_role.items()
        if group is not None
    ]
    least = min(group.cache(cache).block_size for group in placement.groups)
    if least != CacheSettings().block_size:  # by which the router names prefixes
        told = yaml.safe_dump([_argument("block-size", least)], sort_keys=False)
        unused = [f"disagg-{role.value}" for role, group in by_role.items() if group is None]
        targets = [{"kind": "Deployment"}, *({"kind": "StatefulSet", "name": name} for name in unused)]
        patches += [{"target": target, "patch": told} for target in targets]
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [BASE],
        "replicas": counts,
        "patches": patches,
    }
    return _HEAD + yaml.dump(overlay, Dumper=_Blocks, sort_keys=False)


def _only_group(role: Role, groups: Sequence[InstanceGroup]) -> InstanceGroup | None:
    if len(groups) > 1:
        raise ConfigurationError(
            f"the placement has {len(groups)} kinds of {role.value} instances, and a StatefulSet has equal pods: write "
            "an overlay with a second StatefulSet, from the placement file (-o)"
        )
    return groups[0] if groups else None


def _patch(group: InstanceGroup, cache: CacheSettings) -> list[dict[str, Any]]:
    own = group.cache(cache)
    flags = {
        "threads": group.num_threads,
        "kv-memory": format_bytes(own.kv_memory_bytes),
        "block-size": None if own.block_size == CacheSettings().block_size else own.block_size,
        "scheduling": None if group.scheduling is None else group.scheduling.value,
        "max-batch-tokens": group.max_batch_tokens,
        "max-batch-size": group.max_batch_size,
    }
    told = [_argument(flag, value) for flag, value in flags.items() if value is not None]
    size = {"cpu": str(group.num_threads or 1), "memory": str(own.kv_memory_bytes + _BESIDE_KV)}
    resources = {"requests": size, "limits": dict(size)}
    return [*told, {"op": "replace", "path": f"{_CONTAINER}/resources", "value": resources}]


def _argument(flag: str, value: object) -> dict[str, Any]:
    return {"op": "add", "path": f"{_CONTAINER}/args/-", "value": f"--{flag}={value}"}


class _Blocks(yaml.SafeDumper):
    """Writes patches as the blocks of text that people write."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)
