"""What is running, as JSON for the page at ``/`` and for scripts."""

import msgspec

from disagg.base.request import Role
from disagg.serve.api.metrics import kv_usage
from disagg.serve.router.interface import InstanceState, InstanceStatus, Router


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as the page shows it."""

    instance: str
    role: str
    state: str
    pid: int | None
    device: str | None
    kernel_backend: str | None
    num_running: int
    num_waiting: int
    num_leases: int
    kv_usage: float
    kv_bytes: int | None
    num_restarts: int
    detail: str


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """The whole server."""

    model: str
    version: str
    ready: bool
    missing: str
    instances: list[InstanceView]


def view(router: Router, model: str, version: str) -> ServerView:
    """Return what is running now."""
    instances = router.instances()
    return ServerView(
        model=model,
        version=version,
        ready=router.is_ready(),
        missing="" if router.is_ready() else what_is_missing(instances),
        instances=[_instance_view(status) for status in instances],
    )


def what_is_missing(instances: tuple[InstanceStatus, ...]) -> str:
    """Say which live instances would make the server ready."""
    live = {status.role for status in instances if status.state is InstanceState.READY}
    configured = {status.role for status in instances}
    missing = [role.value for role in (Role.PREFILL, Role.DECODE) if role in configured - live]
    if missing:
        return f"no live {' and no live '.join(missing)} instance"
    return "no live instance"


def _instance_view(status: InstanceStatus) -> InstanceView:
    facts, load = status.facts, status.load
    return InstanceView(
        instance=status.instance,
        role=status.role.value,
        state=status.state.value,
        pid=facts.pid if facts else None,
        device=facts.device if facts else None,
        kernel_backend=facts.kernel_backend if facts else None,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_leases=load.num_leases,
        kv_usage=kv_usage(load),
        kv_bytes=facts.kv_bytes if facts else None,
        num_restarts=status.num_restarts,
        detail=status.detail,
    )
