"""What fits: how long a sequence an instance holds, and how many tokens of one it must hold."""

import sys
from collections.abc import Collection

from disagg.base.config import SchedulerSettings, SchedulingMode
from disagg.base.request import Role
from disagg.base.step_limits import StepLimits
from disagg.base.window_blocks import WindowBlocks
from disagg.scheduling.by_objectives import scheduling_mode
from disagg.scheduling.step.threads import ONE_THREAD, StepThreads


def step_limits(settings: SchedulerSettings, threads: StepThreads = ONE_THREAD) -> StepLimits:
    """Return what bounds the steps of an instance with these settings, as it tells the router."""
    return StepLimits(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_size=settings.max_batch_size,
        sized_by_slack=scheduling_mode(settings) is SchedulingMode.SLACK,
        num_threads=threads.num_own,
        num_borrowable=threads.num_borrowable,
    )


def capacity_tokens(
    num_blocks: int,
    block_size: int,
    max_model_len: int | None = None,
    window: WindowBlocks | None = None,
    most_in_sight: int = 0,
) -> int:
    """Return the longest sequence, prompt plus answer in tokens, that an instance of this KV pool and limit holds.

    At most ``most_in_sight`` of its blocks have those of a ``window`` beside them.
    """
    if window is not None:
        num_beside = window.num_each * most_in_sight
        outgrows = num_blocks > most_in_sight + num_beside
        num_blocks = num_blocks - num_beside if outgrows else num_blocks // (1 + window.num_each)
    pool = num_blocks * block_size
    return pool if max_model_len is None else min(pool, max_model_len)


def most_in_sight(window: WindowBlocks | None, settings: SchedulerSettings, block_size: int) -> int:
    """Return of how many blocks in a row a sequence needs the layers with a ``window`` at once; 0 without one.

    Where prompts are computed whole, of all.
    """
    if window is None:
        return 0
    if scheduling_mode(settings) in (SchedulingMode.PREFILL_FIRST, SchedulingMode.DECODE_FIRST):
        return sys.maxsize
    return window.most_in_sight(settings.max_batch_tokens * settings.max_steps_in_flight, block_size)


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
