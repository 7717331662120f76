"""The shapes of ``/status``, ``/ready`` and ``/requests``: what the pages, ``disagg top`` and scripts read.

Fields are added, never renamed; those that came later have defaults, so that a newer client reads an older server.
"""

import msgspec

from disagg.scheduling.router.scaling import ScalingView


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """``/ready``. ``detail`` says which instances are missing, and what they are doing."""

    ready: bool
    detail: str


class InstanceView(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as the pages show it. What start-up finds out is null until it has.

    Counters (``_total``) start anew with the instance.
    """

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
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    num_leases_expired_total: int = 0
    num_prefix_queries_total: int = 0
    num_prefix_hits_total: int = 0
    num_sequences: int = 0
    """Sequences that it computes, or whose KV blocks it keeps for another instance."""
    is_leaving: bool = False
    num_prefix_pulled_total: int = 0
    num_prefix_from_host_total: int = 0
    num_prefix_loaded_total: int = 0
    blocks_on_host: int = 0
    blocks_on_disk: int = 0


class InstanceList(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /admin/instances``."""

    instances: list[InstanceView]
    scaling: list[ScalingView] = []
    plan: str = ""


class LinkView(msgspec.Struct, frozen=True, kw_only=True):
    """One link over which KV blocks are handed over. Speeds are in bytes per second; 0 what is not known.

    ``limit`` is what the hardware between the two is, ``limit_bytes_per_s`` what it gives.
    """

    source: str
    target: str
    is_measured: bool
    link: str = ""
    why: str = ""
    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    limit_bytes_per_s: float = 0.0
    limit: str = ""
    warning: str = ""
    """What is wrong with it; empty for nothing."""


class LinkList(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /admin/links``."""

    links: list[LinkView]


class AuditView(msgspec.Struct, frozen=True, kw_only=True):
    """The KV blocks of one instance at one instant, by state; ``faults`` say what does not add up."""

    instance: str
    total: int
    blocks: dict[str, int]
    num_held: int
    """Neither free nor merely cached."""
    num_sequences: int
    """That it computes, or that wait there."""
    num_leases: int
    faults: tuple[str, ...] = ()


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """``GET /debug/audit``. ``faults`` are those of no one instance that answered."""

    is_exact: bool
    instances: list[AuditView]
    faults: tuple[str, ...] = ()


class CommandReply(msgspec.Struct, frozen=True, kw_only=True):
    """What a command of ``/admin`` began; it may take a while to end."""

    instance: str
    message: str


class HandOverTotals(msgspec.Struct, kw_only=True):
    """KV pulls since the server started. Those that failed are not in the other figures."""

    num_total: int = 0
    num_failures_total: int = 0
    bytes_total: int = 0
    seconds_total: float = 0.0


class PredictionTotals(msgspec.Struct, kw_only=True):
    """Requests whose path was chosen by prediction, and what admission did, since the server started."""

    num_total: int = 0
    num_leaning_total: int = 0
    """Those that went against the roles, and their share of the prompt tokens."""
    prompt_tokens_total: int = 0
    leaning_prompt_tokens_total: int = 0
    ttft_seconds_total: float = 0.0
    ttft_error_seconds_total: float = 0.0
    ttft_regret_seconds_total: float = 0.0
    num_refused_total: int = 0
    num_shed_total: int = 0
    """Of those refused, what was predicted to miss its objectives."""
    num_degraded_total: int = 0


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """``/status``. ``num_under_way`` counts sequences that clients wait for, ``now_unix_s`` is the server's clock.

    ``can_chat`` is false for a model without a chat template.
    """

    model: str
    version: str
    ready: bool
    detail: str
    max_model_len: int | None
    instances: list[InstanceView]
    now_unix_s: float = 0.0
    num_under_way: int = 0
    can_chat: bool = True
    hand_overs: HandOverTotals = msgspec.field(default_factory=HandOverTotals)
    predictions: PredictionTotals = msgspec.field(default_factory=PredictionTotals)
    scaling: list[ScalingView] = []
    plan: str = ""
    """What was decided last of the placement, with its numbers."""


class RequestView(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence that has ended. A request with several choices or prompts has one for each, numbered ``choice``.

    ``stages`` are seconds by ``measure.timeline.Stage``, ``stamps`` seconds since the arrival without those of stages
    that were not passed; both are empty for what was refused. The stages add up to the stamp ``finished``; to the one
    before it for what did not come to its end (``finish_reason`` abort or error): that has no ``tpot_s`` and ``e2e_s``
    either. A single token has no ``tpot_s``.
    """

    request_id: str
    arrival_unix_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    finish_reason: str
    sequence: int = 0
    choice: int = 0
    prefill_instance: str | None = None
    decode_instance: str | None = None
    num_cached_tokens: int = 0
    is_best_effort: bool = False
    error: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    stages: dict[str, float] = {}
    stamps: dict[str, float] = {}


class RequestPage(msgspec.Struct, frozen=True, kw_only=True):
    """``/requests``: ``next`` is the next page's ``after``; ``dropped`` counts those after ``after`` that are gone."""

    next: int
    dropped: int
    requests: list[RequestView]
