"""Accounting for one request: its latencies as tokens come, its stages and one log line at its end."""

import logging
import math
from types import TracebackType

from disagg.base.clock import Clock
from disagg.base.errors import DisaggError, http_status
from disagg.base.sampling import FinishReason
from disagg.measure.timeline import RequestTimeline
from disagg.serve.api.answer import Answer, Delta
from disagg.serve.api.disconnect import ClientDisconnectedError
from disagg.serve.api.jobs import Job
from disagg.serve.api.metrics import ServerMetrics

logger = logging.getLogger(__name__)


class RequestObserver:
    """Accounts for one job from ``with`` to its end; choices that have not finished then count as aborted or failed.

    Times are seconds of ``clock``; TTFT and end-to-end times count from ``arrival_s``.
    """

    def __init__(self, metrics: ServerMetrics, clock: Clock, job: Job, request_id: str, arrival_s: float) -> None:
        self._metrics = metrics
        self._clock = clock
        self._job = job
        self._request_id = request_id
        self._arrival_s = arrival_s
        self._ttft_s = math.nan
        self._first_s: dict[int, float] = {}
        self._last_s: dict[int, float] = {}
        self._failure: Exception | None = None

    def __enter__(self) -> "RequestObserver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.failed(error)
        how = FinishReason.ERROR if self._failure is not None else FinishReason.ABORT
        for answer in self._job.answers:
            if answer.finish_reason is None:
                self._metrics.choice_ended(how)
        self._log(how)

    def see(self, delta: Delta) -> None:
        """Account for one delta."""
        now = self._clock.now()
        last_s = self._last_s.get(delta.choice)
        if last_s is None:
            self._see_first(delta.choice, now)
        else:
            self._metrics.inter_token.observe(now - last_s)
        self._last_s[delta.choice] = now
        self._metrics.generation_tokens.inc(len(delta.token_ids))

    def finished(self, choice: int, reason: FinishReason, answer: Answer, timeline: RequestTimeline) -> None:
        """Account for a choice that is complete."""
        metrics, last_s = self._metrics, self._last_s[choice]
        metrics.choice_ended(reason)
        metrics.e2e.observe(last_s - self._arrival_s)
        metrics.num_prompt_tokens.observe(len(answer.request.prompt_token_ids))
        metrics.num_generation_tokens.observe(answer.num_tokens)
        if answer.num_tokens > 1:
            metrics.time_per_output_token.observe((last_s - self._first_s[choice]) / (answer.num_tokens - 1))
        metrics.stages_passed(timeline)

    def failed(self, error: Exception) -> None:
        """Remember what ended the request, unless its client did."""
        if not isinstance(error, ClientDisconnectedError):
            self._failure = error

    def failed_in_stream(self, error: DisaggError) -> None:
        """Account for an error whose status could no longer be sent."""
        self.failed(error)
        self._metrics.error_shown(http_status(error))

    def _see_first(self, choice: int, now: float) -> None:
        if not self._first_s:
            self._ttft_s = now - self._arrival_s
            self._metrics.prompt_tokens.inc(self._job.num_prompt_tokens)
        self._first_s[choice] = now
        self._metrics.ttft.observe(now - self._arrival_s)

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
            f" error={self._failure}" if self._failure is not None else "",
        )
