"""Everything that one ``disagg serve`` is told, and what it makes of it: the settings of each instance."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from disagg.base.block_sizes import why_not_made
from disagg.base.config import (
    CacheSettings,
    CurveKeys,
    Device,
    InstanceGroup,
    InstanceSettings,
    ModelSettings,
    Placement,
    RouterSettings,
    SchedulerSettings,
    ServeSettings,
)
from disagg.base.core_settings import LentCores
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.joining import ServerTerms
from disagg.base.request import Role
from disagg.base.transfer_settings import TransferSettings
from disagg.base.units import format_ranges
from disagg.scheduling.host_cores import are_lent, assign_cores, cores_to_borrow, least_taken_cores


class HostSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of this host the instances use."""

    device: Annotated[Device, Meta(description="where the engines compute")] = Device.CPU
    cpus: Annotated[
        tuple[int, ...],
        Meta(
            description="cores that the instances share out, such as 0,1,4-7 [default: all that this process may use]"
        ),
    ] = ()
    threads: (
        Annotated[int, Meta(ge=1, description="compute threads of each instance [default: one for each of its cores]")]
        | None
    ) = None
    lend_cores: (
        Annotated[
            bool,
            Meta(
                description="lend the cores of an instance without a step to its neighbours' steps [default: as the "
                "placement says, or where threads are not given]"
            ),
        ]
        | None
    ) = None
    kernels: Annotated[
        str | None, Meta(description="kernels of the engines: native or torch [default: the best that is there]")
    ] = None
    latency: Annotated[
        str | None,
        Meta(
            description="profile (disagg profile) that predicts step times [default: learned from the steps that run]"
        ),
    ] = None
    kv_events: Annotated[
        str | None,
        Meta(
            description="ZeroMQ endpoint, such as tcp://127.0.0.1:5557, on which KV events are published in vLLM's "
            "format, for other routers"
        ),
    ] = None
    event_log: Annotated[
        str | None, Meta(description="folder that receives every decision of router and schedulers, for replay")
    ] = None


class RemoteSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Instances on other hosts."""

    listen_instances: Annotated[
        str | None,
        Meta(description="HOST:PORT at which instances on other hosts join (serve --join) [default: none may]"),
    ] = None
    keys: Annotated[
        str | None,
        Meta(description="folder of the keys with which hosts know each other [default: ~/.config/disagg/keys]"),
    ] = None
    kv_host: Annotated[
        str | None,
        Meta(
            description="address of this host at which others read KV blocks [default: that of --listen-instances, "
            "or the one from which --join reaches the server]"
        ),
    ] = None
    cluster: Annotated[
        str | None,
        Meta(
            description="Ray cluster whose nodes run the instances: ray for the one that this host belongs to, or "
            "ray://HEAD [default: this host runs them]"
        ),
    ] = None
    ready_file: Annotated[
        str | None,
        Meta(description="file that is there while the instance of --join takes requests, for probes [default: none]"),
    ] = None


class FrontSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The processes that serve clients."""

    routers: (
        Annotated[
            int,
            Meta(
                ge=1,
                le=64,
                description="processes that serve the API and route, each with clients of its own, before the same "
                "instances [default: one, which runs the instances as well]",
            ),
        ]
        | None
    ) = None
    restart_timeout_s: Annotated[
        float,
        Meta(
            ge=0,
            le=86400,
            description="seconds that running requests get to finish when --routers are started anew (SIGHUP, disagg "
            "ctl restart)",
        ),
    ] = 60.0


class Deployment(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server: its model, its instances, its address."""

    placement: Placement
    model: ModelSettings = ModelSettings()
    cache: CacheSettings = CacheSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    transfer: TransferSettings = TransferSettings()
    router: RouterSettings = RouterSettings()
    serve: ServeSettings = ServeSettings()
    host: HostSettings = HostSettings()
    remote: RemoteSettings = RemoteSettings()
    front: FrontSettings = FrontSettings()

    def roles(self) -> dict[InstanceId, Role]:
        """Return the instances by name: prefill before decode before colocated, as cores are given out."""
        return {
            InstanceId(f"{role.value}-{index}"): role for role in Role for index in range(self.placement.count(role))
        }


def plan_instances(
    deployment: Deployment,
    *,
    control_endpoint: str,
    available_cores: Sequence[int],
    parent_pid: int,
    control_key: str | None = None,
    weights: str | None = None,
    core_board: str | None = None,
    kv_host: str | None = None,
) -> tuple[InstanceSettings, ...]:
    """Return what each instance is told at its start, in the order of ``Deployment.roles``.

    Raises ConfigurationError for a placement that this version cannot run, or cores that are not there.
    """
    groups = _groups(deployment)
    wanted = [deployment.host.threads or group.num_threads for group in groups]
    host = deployment.host
    cores = assign_cores(usable_cores(host.cpus, available_cores), wanted)
    board = core_board if _lends_cores(deployment, wanted) else None
    return tuple(
        InstanceSettings(
            instance=name,
            role=role,
            control_endpoint=control_endpoint,
            control_key=control_key,
            model=group.model(deployment.model),
            cache=group.cache(deployment.cache),
            scheduler=_scheduler(deployment, group),
            transfer=deployment.transfer,
            kv_host=kv_host,
            kv_disk=deployment.cache.disk(len(groups)),
            tells_tokens=terms_of(deployment).tells_tokens,
            device=host.device,
            cpus=own_cores,
            num_threads=num_threads or len(own_cores),
            lent_cores=_lent_cores(board, borrowed),
            kernel_backend=group.kernels or host.kernels,
            latency=host.latency,
            event_log=_event_log(host, name),
            weights=weights,
            parent_pid=parent_pid,
        )
        for (name, role), group, own_cores, num_threads, borrowed in zip(
            deployment.roles().items(), groups, cores, wanted, cores_to_borrow(cores), strict=True
        )
    )


def plan_addition(
    deployment: Deployment,
    planned: Sequence[InstanceSettings],
    present: Sequence[InstanceSettings],
    name: InstanceId,
    role: Role,
    available_cores: Sequence[int],
) -> InstanceSettings:
    """Return what one more instance is told. ``planned`` are those of the start, ``present`` those that there are now.

    It is as those of its role, on cores that are left; where too few are, it shares those that fewest others have.
    Raises ConfigurationError for a server all of whose instances are on other hosts.
    """
    if not planned:
        raise ConfigurationError(
            "this server began without an instance of its own, and has none to go by: start one more on a host of its "
            "own, with disagg serve --join"
        )
    host = deployment.host
    like = next((settings for settings in planned if settings.role is role), planned[0])
    group = next(
        (group for group in deployment.placement.groups if group.role is role), InstanceGroup(role=role, count=1)
    )
    num_threads = host.threads or group.num_threads or like.num_threads
    taken = [core for settings in present for core in settings.cpus]
    cores = least_taken_cores(usable_cores(host.cpus, available_cores), taken, num_threads)
    board = None if like.lent_cores is None else like.lent_cores.board
    *_, borrowed = cores_to_borrow([*(settings.cpus for settings in present), cores])
    return msgspec.structs.replace(
        like,
        instance=name,
        role=role,
        model=group.model(deployment.model),
        cache=group.cache(deployment.cache),
        scheduler=_scheduler(deployment, group),
        kernel_backend=group.kernels or host.kernels,
        cpus=cores,
        num_threads=num_threads,
        lent_cores=_lent_cores(board, borrowed),
        event_log=_event_log(host, name),
    )


def plan_guest(
    deployment: Deployment, group: InstanceGroup, keys: CurveKeys, available_cores: Sequence[int], parent_pid: int
) -> InstanceSettings:
    """Return what this host tells one of a group's instances, for another host's server, but for what that says of it.

    It has the whole of ``--kv-disk``, and is pinned to the cores of ``--cpus`` alone: others on this host may be
    neighbours that it knows nothing of. Raises ConfigurationError for cores that are not there.
    """
    alone = Placement(groups=(msgspec.structs.replace(group, count=1, devices=()),), others_join=True)
    (settings,) = plan_instances(
        msgspec.structs.replace(deployment, placement=alone),
        control_endpoint="",
        available_cores=available_cores,
        parent_pid=parent_pid,
    )
    return msgspec.structs.replace(settings, control_curve=keys, cpus=deployment.host.cpus)


def hash_block_size(deployment: Deployment) -> int:
    """Return of how many tokens the KV blocks are that prompts' prefixes are named by: the smallest of any instance.

    Raises ConfigurationError where others are no multiple of it: such blocks cannot be made of each other.
    """
    sizes = {group.cache(deployment.cache).block_size for group in deployment.placement.groups}
    least = min(sizes, default=deployment.cache.block_size)
    for size in sorted(sizes):
        if why := why_not_made(least, size):
            raise ConfigurationError(f"the placement has {why}")
    return least


def terms_of(deployment: Deployment) -> ServerTerms:
    """Return what a server decides for all its instances, on other hosts too."""
    return ServerTerms(
        tells_costs=deployment.router.needs_costs,
        tells_tokens=deployment.host.kv_events is not None,
        objectives=deployment.scheduler.objectives,
    )


def under_terms(scheduler: SchedulerSettings, terms: ServerTerms) -> SchedulerSettings:
    """Return a scheduler's settings with what the server decides."""
    return msgspec.structs.replace(scheduler, tells_costs=terms.tells_costs, objectives=terms.objectives)


def _scheduler(deployment: Deployment, group: InstanceGroup) -> SchedulerSettings:
    return group.scheduler(under_terms(deployment.scheduler, terms_of(deployment)))


def _lends_cores(deployment: Deployment, wanted: Sequence[int | None]) -> bool:
    """Return whether instances lend each other their cores; ``wanted`` are the threads given for each."""
    if deployment.host.device is not Device.CPU or deployment.scheduler.max_steps_in_flight > 1:
        return False
    return are_lent(deployment.host.lend_cores, deployment.placement.lend_cores, wanted)


def _lent_cores(board: str | None, cores: tuple[int, ...]) -> LentCores | None:
    return LentCores(board=board, cores=cores) if board is not None and cores else None


def _event_log(host: HostSettings, name: InstanceId) -> str | None:
    return None if host.event_log is None else f"{host.event_log}/{name}.jsonl"


def _groups(deployment: Deployment) -> list[InstanceGroup]:
    """Return the group of each instance, in the order of ``Deployment.roles``."""
    groups = [group for role in Role for group in deployment.placement.groups if group.role is role]
    for group in groups:
        check_parallelism(group)
        if group.devices:
            raise ConfigurationError(
                f"the placement puts {group.role.value} instances on {', '.join(group.devices)} of a cluster: disagg "
                "serve starts instances on this host's cores; leave out devices, give --cluster ray, or print "
                "commands of another engine with disagg plan --as"
            )
    return [group for group in groups for _ in range(group.count)]


def check_parallelism(group: InstanceGroup) -> None:
    """Raise ConfigurationError for instances of several devices."""
    if group.tensor_parallel > 1 or group.pipeline_parallel > 1:
        raise ConfigurationError(
            f"tensor_parallel {group.tensor_parallel} and pipeline_parallel {group.pipeline_parallel} "
            f"of the {group.role.value} instances: only 1 and 1 are supported"
        )


def usable_cores(asked: Sequence[int], available: Sequence[int]) -> Sequence[int]:
    """Return the cores that instances share out; raise ConfigurationError for asked ones that are not available."""
    if absent := sorted(set(asked) - set(available)):
        raise ConfigurationError(
            f"--cpus names core {format_ranges(absent)}, but this process may use {format_ranges(sorted(available))}"
        )
    return list(dict.fromkeys(asked)) or sorted(available)
