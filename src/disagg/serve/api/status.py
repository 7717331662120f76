"""What is running, in words for people and probes and as JSON for the page at ``/`` and for scripts."""

from collections.abc import Sequence

import msgspec

from disagg.base.request import Role
from disagg.serve.api.instance_metrics import BLOCK_STATES, kv_usage
from disagg.serve.router.interface import InstanceState, InstanceStatus, Router


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """``/ready``. ``detail`` says which instances are missing, and what they are doing."""

    ready: bool
    detail: str


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as the page shows it. What start-up finds out is null until it has."""

    instance: str
    role: str
    state: str
    detail: str
    pid: int | None
    device: str | None
    kernel_backend: str | None
    num_running: int
    num_waiting: int
    num_leases: int
    num_restarts: int
    num_prefill_tokens_total: int
    num_decode_tokens_total: int
    kv_usage: float
    kv_bytes: int | None
    block_size: int | None
    blocks: dict[str, int]


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """``/status``."""

    model: str
    version: str
    ready: bool
    detail: str
    max_model_len: int | None
    instances: list[InstanceView]


def server_view(router: Router, model: str, version: str) -> ServerView:
    """Return what is running now."""
    instances = router.instances()
    state = readiness(router)
    return ServerView(
        model=model,
        version=version,
        ready=state.ready,
        detail=state.detail,
        max_model_len=min((status.facts.max_model_len for status in instances if status.facts), default=None),
        instances=[_instance_view(status) for status in instances],
    )


def readiness(router: Router) -> Readiness:
    """Return whether requests can be served, and if not, why."""
    ready = router.is_ready()
    return Readiness(ready=ready, detail="" if ready else _what_is_missing(router.instances()))


def _what_is_missing(instances: Sequence[InstanceStatus]) -> str:
    """Say which roles have no live instance, and how those that could fill them are."""
    missing = [role for role in Role if _lacks(role, instances)]
    if not missing:
        return "the server is stopping"
    return "; ".join(
        f"no {role.value} instance is ready: "
        + ", ".join(_describe(status) for status in instances if status.role is role)
        for role in missing
    )


def _lacks(role: Role, instances: Sequence[InstanceStatus]) -> bool:
    states = [status.state for status in instances if status.role is role]
    return bool(states) and InstanceState.READY not in states


def _describe(status: InstanceStatus) -> str:
    return f"{status.instance} is {status.state.value}" + (f" ({status.detail})" if status.detail else "")


def _instance_view(status: InstanceStatus) -> InstanceView:
    facts, load = status.facts, status.load
    return InstanceView(
        instance=status.instance,
        role=status.role.value,
        state=status.state.value,
        detail=status.detail,
        pid=facts.pid if facts else None,
        device=facts.device if facts else None,
        kernel_backend=facts.kernel_backend if facts else None,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_leases=load.num_leases,
        num_restarts=status.num_restarts,
        num_prefill_tokens_total=load.num_prefill_tokens_total,
        num_decode_tokens_total=load.num_decode_tokens_total,
        kv_usage=kv_usage(load),
        kv_bytes=facts.kv_bytes if facts else None,
        block_size=facts.block_size if facts else None,
        blocks={state: int(read(load)) for state, read in BLOCK_STATES.items()},
    )
