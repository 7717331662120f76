"""Accounting for one request: its latencies as tokens come, its stages and one log line at its end."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from disagg.base.clock import Clock
from disagg.base.errors import DisaggError, http_status
from disagg.base.objectives import Objectives
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason
from disagg.base.text import one_line
from disagg.serve.api.answer import Answer, Delta
from disagg.serve.api.disconnect import ClientDisconnectedError
from disagg.serve.api.jobs import Job
from disagg.serve.api.metrics import ServerMetrics
from disagg.serve.api.recent_requests import RecentRequests, with_stages
from disagg.serve.api.views import RequestView
from disagg.serve.router.interface import SequenceStream

if TYPE_CHECKING:  # its library is an extra
    from disagg.serve.api.tracing import RequestTrace, Traces

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Accounts:
    """Where requests are accounted for. ``clock`` is the one that the router stamps timelines with."""

    metrics: ServerMetrics
    recent: RecentRequests
    clock: Clock
    traces: "Traces | None" = None
    objectives: Objectives = field(default_factory=Objectives)
    """Of requests that have none of their own."""


@dataclass(slots=True)
class _Progress:
    """When the first and the last output of a choice came, and what its prefill found in the cache."""

    first_s: float
    last_s: float
    num_cached_tokens: int


class RequestObserver:
    """Accounts for one job from ``with`` to its end; choices that have not finished then count as aborted or failed.

    Times are seconds of the accounts' clock; TTFT and end-to-end times count from ``arrival_s``.
    """

    def __init__(
        self, accounts: Accounts, job: Job, request_id: str, arrival_s: float, trace: "RequestTrace | None" = None
    ) -> None:
        self._metrics = accounts.metrics
        self._tokens = accounts.metrics.tokens
        self._recent = accounts.recent
        self._clock = accounts.clock
        self._job = job
        self._request_id = request_id
        self._arrival_s = arrival_s
        self._objectives = accounts.objectives
        self._trace = trace
        self._ttft_s = math.nan
        self._streams: Sequence[SequenceStream] = ()
        self._progress: dict[int, _Progress] = {}
        self._failure: Exception | None = None

    def __enter__(self) -> "RequestObserver":
        self._recent.num_under_way += len(self._job.answers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.failed(error)
        how = FinishReason.ERROR if self._failure is not None else FinishReason.ABORT
        for choice, answer in enumerate(self._job.answers):
            if answer.finish_reason is None:
                self._ended(choice, how, answer)
        self._log(how)

    def submitted(self, streams: Sequence[SequenceStream]) -> None:
        """Learn where the sequences' timelines are."""
        self._streams = streams

    def see(self, delta: Delta) -> None:
        """Account for one delta."""
        now = self._clock.now()
        progress = self._progress.get(delta.choice)
        if progress is None:
            self._see_first(delta, now)
        else:
            self._tokens.add_gap(now - progress.last_s)
            progress.last_s = now
        self._tokens.add(len(delta.token_ids))

    def finished(self, choice: int, reason: FinishReason, answer: Answer) -> None:
        """Account for a choice that is complete."""
        metrics, progress = self._metrics, self._progress[choice]
        e2e_s, tpot_s = progress.last_s - self._arrival_s, None
        metrics.e2e.observe(e2e_s)
        metrics.num_prompt_tokens.observe(len(answer.request.prompt_token_ids))
        metrics.num_generation_tokens.observe(answer.num_tokens)
        if answer.num_tokens > 1:
            tpot_s = (progress.last_s - progress.first_s) / (answer.num_tokens - 1)
            metrics.time_per_output_token.observe(tpot_s)
        metrics.stages_passed(self._streams[choice].timeline)
        self._ended(choice, reason, answer, tpot_s, e2e_s)

    def failed(self, error: Exception) -> None:
        """Remember what ended the request, unless its client did."""
        if not isinstance(error, ClientDisconnectedError):
            self._failure = error

    def failed_in_stream(self, error: DisaggError) -> None:
        """Account for an error whose status could no longer be sent."""
        self.failed(error)
        self._metrics.error_shown(http_status(error))

    def _see_first(self, delta: Delta, now: float) -> None:
        if not self._progress:
            self._ttft_s = now - self._arrival_s
            self._metrics.prompt_tokens.inc(self._job.num_prompt_tokens)
        self._progress[delta.choice] = _Progress(now, now, delta.num_cached_tokens)
        self._metrics.ttft.observe(now - self._arrival_s)

    def _ended(
        self,
        choice: int,
        reason: FinishReason,
        answer: Answer,
        tpot_s: float | None = None,
        e2e_s: float | None = None,
    ) -> None:
        """Count a choice by how it ended, and keep what there is to show of it."""
        request, progress = answer.request, self._progress.get(choice)
        ttft_s = progress.first_s - self._arrival_s if progress else None
        self._recent.num_under_way -= 1
        self._metrics.choice_ended(reason)
        is_answer = reason not in (FinishReason.ERROR, FinishReason.ABORT)
        has_kept = is_answer and self._keeps(request, ttft_s, tpot_s)
        self._metrics.predictions.held_to_objectives(request.service_class, has_kept=has_kept)
        now = self._clock.now()
        view = RequestView(
            request_id=self._request_id,
            choice=choice,
            arrival_unix_s=self._recent.unix_time_of(self._arrival_s, now),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_output_tokens=answer.num_tokens,
            num_cached_tokens=progress.num_cached_tokens if progress else 0,
            finish_reason=reason.value,
            error=self._error_shown() if reason is FinishReason.ERROR else "",
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            e2e_s=e2e_s,
        )
        if self._streams:
            view = with_stages(view, self._streams[choice], now)
        self._recent.add(view)
        if self._trace is not None:
            self._trace.choice_ended(view, len(self._job.answers))

    def _keeps(self, request: GenerationRequest, ttft_s: float | None, tpot_s: float | None) -> bool:
        """Return whether a finished choice of these latencies keeps its objectives; one without tokens does."""
        wanted = request.objectives.or_else(self._objectives)
        in_time = wanted.ttft_s is None or (ttft_s or 0.0) <= wanted.ttft_s
        return in_time and (wanted.tpot_s is None or (tpot_s or 0.0) <= wanted.tpot_s)

    def _error_shown(self) -> str:
        """Return the words of what failed; those of a fault of ours are for the log alone."""
        return str(self._failure) if isinstance(self._failure, DisaggError) else "internal error"

    def _log(self, how: FinishReason) -> None:
        job = self._job
        reasons = {(answer.finish_reason or how).value: None for answer in job.answers}
        logger.info(
            "%s request_id=%s finished=%s choices=%d prompt_tokens=%d answer_tokens=%d ttft_ms=%.1f e2e_ms=%.1f%s",
            job.response_id,
            self._request_id,
            ",".join(reasons),
            len(job.answers),
            job.num_prompt_tokens,
            sum(answer.num_tokens for answer in job.answers),
            self._ttft_s * 1e3,
            (self._clock.now() - self._arrival_s) * 1e3,
            f" error={one_line(str(self._failure))}" if self._failure is not None else "",
        )
