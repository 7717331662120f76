"""Engines that can be imitated: each is a choice of settings for the same policies, not a policy of its own."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from disagg.base.disk_settings import DiskSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.platform import Platform
from disagg.costs.topology import InstanceSize, Place, Topology, first_fit, read_devices
from disagg.scheduling.by_objectives import with_roles
from disagg.scheduling.host_cores import assign_cores, cores_to_borrow
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.instance_spec import InstanceSpec, LendingCores

HOST_BYTES_PER_S: Final = 50e9
"""Between the memory of one device and that of its host, over PCIe 5 with 16 lanes."""
NVME: Final = LinkModel(bytes_per_s=2e9, latency_s=1e-4)
"""A disk of the kind that servers have, as read and written block by block."""
_NEVER_S: Final = 1e9
_LIVES_OF_SPARES: Final = 16
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
    kv_host_bytes: int = 0
    """Host memory for KV blocks behind the pool of each instance."""
    kv_disk: DiskSettings | None = None
    """Of all instances together."""
    swap: LinkModel | None = None
    """How preempted KV comes back; None computes it again."""
    shows_progress: bool = False
    """On cores of a host its steps can be read behind."""
    makes_digests: bool = False
    """Of the KV blocks that its instances offer."""
    notes: tuple[str, ...] = field(default=())
    """What the imitation leaves out or approximates."""


def own_rules(
    scheduler: SchedulerSettings | None = None, cache: CacheSettings | None = None, router: RouterSettings | None = None
) -> EngineRules:
    """Return the rules of this package's engine, with the settings that ``disagg serve`` would be given."""
    cache = cache or CacheSettings()
    scheduler = scheduler or SchedulerSettings()
    router = with_roles(router or RouterSettings(), scheduler.objectives)
    scheduler = msgspec.structs.replace(scheduler, tells_costs=router.needs_costs)
    return EngineRules(
        name="disagg",
        schedulers=dict.fromkeys(Role, scheduler),
        block_size=cache.block_size,
        prefix_caching=cache.prefix_caching,
        kv_host_bytes=cache.kv_host_memory_bytes or 0,
        kv_disk=cache.disk(1),
        shows_progress=True,
        makes_digests=True,
        router=router,
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
    lent_cores: int | None = None,
) -> ClusterSpec:
    """Return the cluster in which ``rules`` serve ``placement`` on ``platform``.

    Instances have the devices that the placement names, or else are placed on the nodes of ``topology`` in the order of
    the placement: see ``first_fit``. None puts all on one node whose devices the platform's link joins. ``by_kind``
    names platforms of other kinds of devices, the same model on each; ``platform`` is that of the kinds that are not in
    it. Instances of a host disturb each other as those of the first group do, and where it has so many ``lent_cores``,
    lend each other theirs (``lending``); None: they do not.
    Raises ConfigurationError when the engine has no such role, the platform no figures for a parallelism, or the
    cluster no room.
    """
    groups = [group for group in placement.groups for _ in range(group.count)]
    names = _names(groups)
    disk_bytes = 0 if rules.kv_disk is None else rules.kv_disk.max_bytes // len(groups)
    instances = []
    for name, group, place in zip(names, groups, _places(placement, names, topology), strict=True):
        its_platform, links = platform, None
        if topology is not None:
            its_platform = by_kind.get(topology.node(place[0].node).device, platform)
            links = topology.instance_links(place, group.tensor_parallel)
        spec = build_instance(name, group, its_platform, rules, place, links)
        max_host_blocks, max_disk_blocks = rules.kv_host_bytes // spec.block_bytes, disk_bytes // spec.block_bytes
        instances.append(replace(spec, max_host_blocks=max_host_blocks, max_disk_blocks=max_disk_blocks))
    if lent_cores is not None and topology is None:
        instances = lending(instances, platform, lent_cores)
    num_devices = sum(instance.num_devices for instance in instances)
    first = platform.at_threads(groups[0].num_threads)
    return ClusterSpec(
        instances=tuple(instances),
        router=rules.router,
        topology=topology or Topology.one_node(platform.link, num_devices),
        kv_transfer_dtype=placement.kv_transfer_dtype or KvTransferDtype.RAW,
        accept_s=platform.host.accept_s,
        message_s=platform.host.message_s,
        deliver_s=platform.host.deliver_s,
        interference=first.interference,
        serving=platform.host.serving,
    )


def lending(instances: Sequence[InstanceSpec], platform: Platform, num_cores: int) -> list[InstanceSpec]:
    """Return the instances of a host of so many cores as they lend each other theirs: as ``disagg serve`` lets them.

    They stay as they are where they share cores, compute on devices, or have several steps in flight.
    """
    cores = assign_cores(range(num_cores), [spec.num_threads for spec in instances])
    if platform.num_threads is None or any(spec.scheduler.max_steps_in_flight > 1 for spec in instances):
        return list(instances)
    owners = {core: index for index, own in enumerate(cores) for core in own}
    lent = []
    for spec, own, others in zip(instances, cores, cores_to_borrow(cores), strict=True):
        sums = {0}
        for number in Counter(owners[core] for core in others).values():
            sums |= {one + number for one in sums}
        latencies = {number: platform.at_threads(len(own) + number).latency(1, 1) for number in sorted(sums - {0})}
        lent.append(replace(spec, cores=LendingCores(own=own, others=others, latencies=latencies)) if others else spec)
    return lent


def build_spares(placement: Placement, platform: Platform, rules: EngineRules) -> tuple[InstanceSpec, ...]:
    """Return the instances that may be added to a placement, within the ranges of ``--autoscale``.

    They are as those of their role that are there, or as the first. Each can join once, so there are several times as
    many as may be there at once. Raises ConfigurationError where the placement names devices.
    """
    if any(group.devices for group in placement.groups):
        raise ConfigurationError("instances that are added have no devices of their own: leave out devices")
    spares = []
    for role, bounds in rules.router.ranges.items():
        like = next((group for group in placement.groups if group.role is role), placement.groups[0])
        group = msgspec.structs.replace(like, role=role)
        first = placement.count(role)
        names = (f"{role.value}-{number}" for number in range(first, first + _LIVES_OF_SPARES * bounds.most))
        spares += [build_instance(InstanceId(name), group, platform, rules) for name in names]
    return tuple(spares)


def _places(placement: Placement, names: Sequence[InstanceId], topology: Topology | None) -> list[Place]:
    """Return where each instance is; nowhere in particular without a topology."""
    named = [group for group in placement.groups if group.devices]
    if topology is None:
        if named:
            raise ConfigurationError(
                f"the placement names devices, such as {named[0].devices[0]}: give the --cluster that they are of, or "
                "leave out devices"
            )
        return [()] * len(names)
    if not named:
        groups = [group for group in placement.groups for _ in range(group.count)]
        sizes = [
            InstanceSize(name, group.tensor_parallel, group.pipeline_parallel)
            for name, group in zip(names, groups, strict=True)
        ]
        return first_fit(topology, sizes)
    places: list[Place] = []
    for group in placement.groups:
        size = group.tensor_parallel * group.pipeline_parallel
        devices = read_devices(group.devices)
        if len(devices) != group.count * size:
            raise ConfigurationError(
                f"{group.count} {group.role.value} instance(s) of {size} device(s) each need {group.count * size} "
                f"devices, and the placement names {len(devices)}: name all devices of every group, or none"
            )
        places += [devices[start : start + size] for start in range(0, len(devices), size)]
    return places


def _names(groups: Sequence[InstanceGroup]) -> list[InstanceId]:
    """Return a name for each: its role and its number among those of that role."""
    names, counts = [], dict.fromkeys(Role, 0)
    for group in groups:
        names.append(InstanceId(f"{group.role.value}-{counts[group.role]}"))
        counts[group.role] += 1
    return names


def build_instance(
    name: InstanceId,
    group: InstanceGroup,
    platform: Platform,
    rules: EngineRules,
    place: Place = (),
    links: InstanceLinks | None = None,
) -> InstanceSpec:
    """Return one instance of a group. Raises what ``build_cluster`` raises of it."""
    scheduler = rules.schedulers.get(group.role)
    if scheduler is None:
        can_be = ", ".join(role.value for role in rules.schedulers)
        raise ConfigurationError(
            f"engine {rules.name} has no {group.role.value} instances, only {can_be}: change the placement or --engine"
        )
    tensor, pipeline = group.tensor_parallel, group.pipeline_parallel
    platform = platform.at_threads(group.num_threads)
    scheduler = group.scheduler(scheduler)
    num_in_flight = max(scheduler.max_steps_in_flight, pipeline)
    kv_bytes = group.kv_memory_bytes
    if kv_bytes is None:
        kv_bytes = platform.capacity_tokens(tensor, pipeline) * platform.kv_bytes_per_token
    spec = InstanceSpec(
        name=name,
        role=group.role,
        scheduler=msgspec.structs.replace(scheduler, max_steps_in_flight=num_in_flight),
        num_blocks=0,
        block_size=group.block_size or rules.block_size,
        latency=platform.latency(tensor, pipeline, links),
        kv_bytes_per_token=platform.kv_bytes_per_token,
        kv_window=None if rules.kv_host_bytes or rules.kv_disk is not None else platform.kv_window,
        num_devices=tensor * pipeline,
        num_threads=platform.num_threads or 1,
        place=place,
        prefix_caching=rules.prefix_caching,
        host_memory=LinkModel(HOST_BYTES_PER_S * tensor * pipeline, latency_s=2e-5),
        disk=NVME,
        swap=rules.swap,
        shows_progress=rules.shows_progress and platform.num_threads is not None and pipeline == 1,
        digest_bytes_per_s=platform.host.digest_bytes_per_s if rules.makes_digests else math.inf,
    )
    return replace(spec, num_blocks=kv_bytes // spec.block_bytes)
