"""What fits: how long a sequence an instance holds, and how many tokens of one it must hold."""

from collections.abc import Collection

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.messages import StepLimits
from disagg.base.request import Role


def step_limits(settings: SchedulerSettings) -> StepLimits:
    """Return what bounds the steps of an instance with these settings, as it tells the router."""
    return StepLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_size=settings.max_batch_size,
        sized_by_slack=settings.scheduling is SchedulingMode.SLACK,
    )


def capacity_tokens(num_blocks: int, block_size: int, max_model_len: int | None = None) -> int:
    """Return the longest sequence, prompt plus answer in tokens, that an instance of this KV pool and limit holds."""
    pool = num_blocks * block_size
    return pool if max_model_len is None else min(pool, max_model_len)


def most_tokens(num_tokens: int, max_total_tokens: int, *, hand_over: bool) -> int:
    """Return how many tokens of a sequence an instance holds at most.

    One that hands it over after ``num_tokens`` known tokens never stores the next: another instance writes it.
    """
    return num_tokens if hand_over else max_total_tokens


def serves_requests(roles: Collection[Role], *, strict_roles: bool = True) -> bool:
    """Return whether instances of these roles together can serve a request from prompt to last token."""
    if not strict_roles:
        return bool(roles)
    return Role.COLOCATED in roles or (Role.PREFILL in roles and Role.DECODE in roles)
