"""Engines that can be imitated: each is a choice of settings for the same policies, not a policy of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from disagg.base.config import (
    CacheSettings,
    InstanceGroup,
    Placement,
    RouterSettings,
    SchedulerSettings,
    SchedulingMode,
)
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.platform import Platform
from disagg.costs.topology import InstanceSize, Place, Topology, first_fit
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.instance import InstanceSpec

_NEVER_S: Final = 1e9
_NO_LIMIT: Final = 10**9
_PATIENT_ROUTER: Final = RouterSettings(max_queued_requests=_NO_LIMIT, request_timeout_s=_NEVER_S)


@dataclass(frozen=True, kw_only=True)
class EngineRules:
    """How an engine serves: the settings of its schedulers by role, its cache and its router.

    A role that is missing cannot be placed.
    """

    name: str
    schedulers: Mapping[Role, SchedulerSettings]
    block_size: int
    prefix_caching: bool = False
    router: RouterSettings = _PATIENT_ROUTER
    swap: LinkModel | None = None
    """How preempted KV comes back; None computes it again."""
    notes: tuple[str, ...] = field(default=())
    """What the imitation leaves out or approximates."""


def own_rules(
    scheduler: SchedulerSettings | None = None, cache: CacheSettings | None = None, router: RouterSettings | None = None
) -> EngineRules:
    """Return the rules of this package's engine, with the settings that ``disagg serve`` would be given."""
    scheduler = scheduler or SchedulerSettings()
    cache = cache or CacheSettings()
    return EngineRules(
        name="disagg",
        schedulers=dict.fromkeys(Role, scheduler),
        block_size=cache.block_size,
        prefix_caching=cache.prefix_caching,
        router=router or RouterSettings(),
    )


DISTSERVE: Final = EngineRules(
    name="distserve",
    schedulers={
        Role.PREFILL: SchedulerSettings(
            scheduling=SchedulingMode.PREFILL_FIRST, max_batch_tokens=8192, max_batch_size=128, lease_s=_NEVER_S
        ),
        Role.DECODE: SchedulerSettings(
            max_batch_tokens=65_536,
            max_batch_size=1024,
            max_pulls_in_flight=1024,
            pull_before_step=True,
            fixed_batches=True,
            lease_s=_NEVER_S,
        ),
    },
    block_size=16,
    swap=LinkModel(25e9),
    notes=(
        "settings of evaluation/2-benchmark-serving/2-start-api-server.py",
        "a decode instance pulls when the prompt's blocks fit and one block in a hundred stays free; DistServe: when "
        "they fit and migrated requests that wait for a batch hold less than a twentieth of the blocks",
        "preempted KV comes back over PCIe 4 at 25 GB/s; leaving the device costs nothing",
        "in a pipeline a sequence stays in the batch that it joined; here one that comes while a batch is empty joins "
        "that, in DistServe the one that has just ended, so that it may take minutes until the pipeline holds two",
    ),
)
"""DistServe: whole prompts in FCFS batches of up to 8,192 tokens, pulled hand-overs, swapping."""

VLLM_0_2_3: Final = EngineRules(
    name="vllm-0.2.3",
    schedulers={
        Role.COLOCATED: SchedulerSettings(
            scheduling=SchedulingMode.PREFILL_FIRST, max_batch_tokens=256, max_batch_size=1024
        )
    },
    block_size=16,
    notes=(
        "max_paddings = 256 (vllm/core/scheduler.py) batches prompts only while their padding to the longest is at "
        "most 256 tokens; here prompts of at most 256 tokens in sum share a step, and any other runs alone",
    ),
)
"""vLLM 0.2.3: prompts first, whole, hardly ever two in a step; preempted sequences are computed again."""

IMITATED: Final = {rules.name: rules for rules in (DISTSERVE, VLLM_0_2_3)}


def build_cluster(
    placement: Placement,
    platform: Platform,
    rules: EngineRules,
    topology: Topology | None = None,
    by_kind: Mapping[str, Platform] = {},
) -> ClusterSpec:
    """Return the cluster in which ``rules`` serve ``placement`` on ``platform``.

    Instances are placed on the nodes of ``topology`` in the order of the placement: see ``first_fit``. None puts all on
    one node whose devices the platform's link joins. ``by_kind`` names platforms of other kinds of devices, the same
    model on each; ``platform`` is that of the kinds that are not in it.
    Raises ConfigurationError when the engine has no such role, the platform no figures for a parallelism, or the
    cluster no room.
    """
    groups = [group for group in placement.groups for _ in range(group.count)]
    names = _names(groups)
    places: list[Place] = [()] * len(groups)
    if topology is not None:
        sizes = [
            InstanceSize(name, group.tensor_parallel, group.pipeline_parallel)
            for name, group in zip(names, groups, strict=True)
        ]
        places = first_fit(topology, sizes)
    instances = []
    for name, group, place in zip(names, groups, places, strict=True):
        its_platform, links = platform, None
        if topology is not None:
            its_platform = by_kind.get(topology.node(place[0].node).device, platform)
            links = topology.instance_links(place, group.tensor_parallel)
        instances.append(_instance(name, group, place, its_platform, rules, links))
    num_devices = sum(instance.num_devices for instance in instances)
    return ClusterSpec(
        instances=tuple(instances),
        router=rules.router,
        topology=topology or Topology.one_node(platform.link, num_devices),
        accept_s=platform.host.accept_s,
        message_s=platform.host.message_s,
        deliver_s=platform.host.deliver_s,
        interference=platform.interference,
        serving=platform.host.serving,
    )


def _names(groups: Sequence[InstanceGroup]) -> list[InstanceId]:
    """Return a name for each: its role and its number among those of that role."""
    names, counts = [], dict.fromkeys(Role, 0)
    for group in groups:
        names.append(InstanceId(f"{group.role.value}-{counts[group.role]}"))
        counts[group.role] += 1
    return names


def _instance(
    name: InstanceId,
    group: InstanceGroup,
    place: Place,
    platform: Platform,
    rules: EngineRules,
    links: InstanceLinks | None,
) -> InstanceSpec:
    scheduler = rules.schedulers.get(group.role)
    if scheduler is None:
        can_be = ", ".join(role.value for role in rules.schedulers)
        raise ConfigurationError(
            f"engine {rules.name} has no {group.role.value} instances, only {can_be}: change the placement or --engine"
        )
    tensor, pipeline = group.tensor_parallel, group.pipeline_parallel
    scheduler = group.scheduler(scheduler)
    num_in_flight = max(scheduler.max_steps_in_flight, pipeline)
    if group.kv_memory_bytes is None:
        num_tokens = platform.capacity_tokens(tensor, pipeline)
    else:
        num_tokens = group.kv_memory_bytes // platform.kv_bytes_per_token
    return InstanceSpec(
        name=name,
        role=group.role,
        scheduler=msgspec.structs.replace(scheduler, max_steps_in_flight=num_in_flight),
        num_blocks=num_tokens // rules.block_size,
        block_size=rules.block_size,
        latency=platform.latency(tensor, pipeline, links),
        kv_bytes_per_token=platform.kv_bytes_per_token,
        num_devices=tensor * pipeline,
        place=place,
        prefix_caching=rules.prefix_caching,
        swap=rules.swap,
    )
