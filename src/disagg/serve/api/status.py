"""What is running, in words for people and probes and as JSON for the pages and for scripts."""

import time
from collections.abc import Mapping, Sequence

from disagg.base.ids import InstanceId
from disagg.base.messages import Audited, LinkFigure
from disagg.base.request import Role
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.link_survey import MeasuredLink
from disagg.serve.api.instance_metrics import BLOCK_STATES, kv_usage
from disagg.serve.api.observer import Accounts
from disagg.serve.api.served_model import ServedModel
from disagg.serve.api.views import Audit, AuditView, InstanceView, LinkView, Readiness, ServerView
from disagg.serve.router.interface import InstanceStatus, Router


def server_view(router: Router, model: ServedModel, version: str, accounts: Accounts) -> ServerView:
    """Return what is running now."""
    instances = router.instances()
    state, elastic = readiness(router), router.elastic_view()
    return ServerView(
        model=model.name,
        version=version,
        ready=state.ready,
        detail=state.detail,
        max_model_len=min((status.facts.max_model_len for status in instances if status.facts), default=None),
        instances=[instance_view(status) for status in instances],
        now_unix_s=time.time(),
        num_under_way=accounts.recent.num_under_way,
        can_chat=model.chat_template.available,
        hand_overs=accounts.metrics.hand_overs,
        predictions=accounts.metrics.predictions.totals,
        scaling=list(elastic.scaling),
        plan=plan_words(elastic),
    )


def plan_words(view: ElasticView) -> str:
    """Return what was decided last of the placement; empty before the first plan."""
    return "" if view.plan is None else view.plan.words


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


def link_view(link: MeasuredLink) -> LinkView:
    """Return one link as ``/admin/links`` shows it."""
    figure = link.figure or LinkFigure()
    return LinkView(
        source=link.source,
        target=link.target,
        is_measured=link.figure is not None,
        link=figure.link,
        why=figure.why,
        bytes_per_s=figure.bytes_per_s,
        latency_s=figure.latency_s,
        limit_bytes_per_s=figure.limit_bytes_per_s,
        limit=figure.limit,
        warning=link.warning,
    )


def audit_view(audited: Mapping[InstanceId, Audited], faults: tuple[str, ...]) -> Audit:
    """Return an audit as ``/debug/audit`` shows it."""
    views = []
    for instance, found in audited.items():
        load = found.load
        blocks = {state: int(read(load)) for state, read in BLOCK_STATES.items()}
        own = found.faults
        if sum(blocks.values()) != load.blocks_total:
            own += (f"{sum(blocks.values())} blocks are in a state, the pool has {load.blocks_total}",)
        views.append(
            AuditView(
                instance=instance,
                total=load.blocks_total,
                blocks=blocks,
                num_held=load.blocks_total - load.blocks_free - load.blocks_cached,
                num_sequences=load.num_running + load.num_waiting,
                num_leases=load.num_leases,
                faults=own,
            )
        )
    return Audit(is_exact=not faults and not any(view.faults for view in views), instances=views, faults=faults)


def instance_view(status: InstanceStatus) -> InstanceView:
    """Return one instance as the pages show it."""
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
        num_steps_total=load.num_steps_total,
        num_preemptions_total=load.num_preemptions_total,
        num_leases_expired_total=load.num_leases_expired_total,
        num_prefix_queries_total=load.num_prefix_queries_total,
        num_prefix_hits_total=load.num_prefix_hits_total,
        num_sequences=status.num_sequences,
        is_leaving=status.is_leaving,
        num_prefix_pulled_total=load.num_prefix_pulled_total,
        num_prefix_from_host_total=load.num_prefix_from_host_total,
        num_prefix_loaded_total=load.num_prefix_loaded_total,
        blocks_on_host=load.blocks_on_host,
        blocks_on_disk=load.blocks_on_disk,
    )
