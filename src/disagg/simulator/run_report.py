"""What came out of a simulation: latencies, attainment, where the time went, how full the KV pools were."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

import msgspec

from disagg.base.messages import InstanceLoad
from disagg.base.service_classes import ServiceClass
from disagg.measure.slo import Slo
from disagg.measure.statistics import LogHistogram, Percentiles, ValueSketch
from disagg.measure.timeline import Stage
from disagg.scheduling.dispatch.actions import PathEnded
from disagg.simulator.request import Outcome, SimulatedRequest


class KvUse(msgspec.Struct, frozen=True, kw_only=True):
    """How full the KV pool of one instance was, as fractions. ``course`` holds peaks over equal intervals."""

    instance: str
    mean: float
    peak: float
    interval_s: float
    course: tuple[float, ...]


class PathUse(msgspec.Struct, frozen=True, kw_only=True):
    """What came of predictions that chose paths. Seconds are means over the requests that ended."""

    leaning_share: float
    """Part of all prompt tokens that were prefilled against the roles."""
    ttft_error: float
    """Mean absolute error of predicted TTFT, as a part of the mean TTFT."""
    tpot_error: float
    ttft_regret_s: float
    """By which TTFT was over what the best other path was predicted to bring; 0 where it was not."""
    tpot_regret_s: float

    @classmethod
    def of(cls, ended: Sequence[PathEnded]) -> "PathUse | None":
        """Return the sums of these; None where no predictions chose."""
        if not ended:
            return None
        answers = [one for one in ended if one.tpot_s is not None]
        num_tokens = sum(one.num_prompt_tokens for one in ended)
        return cls(
            leaning_share=sum(one.num_prompt_tokens for one in ended if not one.follows_roles) / num_tokens,
            ttft_error=sum(abs(one.predicted_ttft_s - one.ttft_s) for one in ended)
            / max(1e-9, sum(one.ttft_s for one in ended)),
            tpot_error=sum(abs(one.predicted_tpot_s - (one.tpot_s or 0.0)) for one in answers)
            / max(1e-9, sum(one.tpot_s or 0.0 for one in answers)),
            ttft_regret_s=fmean(max(0.0, one.ttft_regret_s or 0.0) for one in ended),
            tpot_regret_s=fmean(max(0.0, one.tpot_regret_s or 0.0) for one in ended),
        )


class PromptTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Where the prompts' KV came from, in tokens. A prompt that is computed again, after a preemption, counts again."""

    total: int = 0
    computed: int = 0
    cached: int = 0
    """Found in the pool of the instance that computed the rest."""
    pulled: int = 0
    """Lent by another instance."""
    from_host: int = 0
    """Read from host memory behind the pool."""
    loaded: int = 0
    """Read from disk."""


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one class of service ("": of none), held to its objectives. What was refused or failed missed."""

    name: str
    num_requests: int
    num_refused: int
    attainment: float


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run. ``attainment`` counts every request that was sent; refused and failed ones are misses."""

    num_requests: int
    num_finished: int
    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    ttft: Percentiles
    tpot: Percentiles
    itl: Percentiles
    e2e: Percentiles
    stage_shares: dict[str, float]
    """Part of all requests' time that each stage took; they add up to 1."""
    prompt_tokens: PromptTokens
    num_preemptions: int
    span_s: float
    """From the start to the end of the last request."""
    output_tokens_per_s: float
    kv: tuple[KvUse, ...]
    num_refused: int = 0
    paths: PathUse | None = None
    decisions: tuple[tuple[float, str], ...] = ()
    """What autoscaling and re-planning decided, and when."""
    classes: tuple[ClassReport, ...] = ()
    """Of those that have requests, by name; nothing where the placement has no classes."""

    def percentiles(self) -> dict[str, Percentiles]:
        """Return the latencies by the names that a target calls them."""
        return {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2e": self.e2e}


class ClassTally:
    """Counts the requests of one class of service."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self._num_requests = self._num_refused = self._num_met = 0

    def add(self, request: SimulatedRequest) -> None:
        """Count one ended request."""
        self._num_requests += 1
        self._num_refused += request.outcome is Outcome.REFUSED
        self._num_met += request.outcome is Outcome.FINISHED and self._slo.is_met(request.ttft_s, request.tpot_s)

    def report(self, name: str) -> ClassReport:
        """Return what came of them."""
        return ClassReport(
            name=name,
            num_requests=self._num_requests,
            num_refused=self._num_refused,
            attainment=self._num_met / max(1, self._num_requests),
        )


class Collector:
    """Takes each request as it ends, and keeps none: sums and sketches, however many there are.

    Requests of ``classes`` are held to their objectives, too, and to those of ``slo`` where a class has none.
    """

    def __init__(self, slo: Slo, classes: Mapping[str, ServiceClass]) -> None:
        self._slo = slo
        self._class_slos = {name: Slo.of(one.objectives.or_else(slo.objectives())) for name, one in classes.items()}
        self._classes: dict[str, ClassTally] = {}
        self.gaps = LogHistogram()
        self._ttft, self._tpot, self._e2e = ValueSketch(), ValueSketch(), ValueSketch()
        self._stages = dict.fromkeys(Stage, 0.0)
        self._num_requests = self._num_finished = self._num_met = self._num_ttft_met = self._num_tpot_met = 0
        self._num_output_tokens = self._num_prompt_tokens = self._num_refused = 0
        self._paths: list[PathEnded] = []
        self._last_end_s = 0.0

    def add(self, request: SimulatedRequest) -> None:
        """Count one ended request."""
        self._num_requests += 1
        self._num_refused += request.outcome is Outcome.REFUSED
        if self._class_slos:
            self._tally(request.service_class).add(request)
        if request.path_ended is not None:
            self._paths.append(request.path_ended)
        self._num_prompt_tokens += request.prompt_len
        self._last_end_s = max(self._last_end_s, request.timeline.finished_s)
        for stage, duration_s in request.timeline.stages().items():
            self._stages[stage] += duration_s
        if request.outcome is not Outcome.FINISHED:
            return
        self._num_finished += 1
        self._num_output_tokens += request.num_output_tokens
        ttft_s, tpot_s = request.ttft_s, request.tpot_s
        self._ttft.add(ttft_s)
        self._e2e.add(request.timeline.last_token_s + request.deliver_s - request.arrival_s)
        if not math.isnan(tpot_s):
            self._tpot.add(tpot_s)
        ttft_met, tpot_met = self._slo.keeps_ttft(ttft_s), self._slo.keeps_tpot(tpot_s)
        self._num_ttft_met += ttft_met
        self._num_tpot_met += tpot_met
        self._num_met += ttft_met and tpot_met

    def _tally(self, name: str) -> ClassTally:
        tally = self._classes.get(name)
        if tally is None:
            tally = self._classes[name] = ClassTally(self._class_slos.get(name, self._slo))
        return tally

    @property
    def num_missed(self) -> int:
        """Requests that did not keep both objectives."""
        return self._num_requests - self._num_met

    @property
    def last_end_s(self) -> float:
        """When the last request ended."""
        return self._last_end_s

    def report(self, loads: Sequence[InstanceLoad], kv: Sequence[KvUse]) -> RunReport:
        """Return the report of all requests so far, given the counters of every life of every instance."""
        total_s = sum(self._stages.values())
        span_s = self._last_end_s
        count = max(1, self._num_requests)
        return RunReport(
            num_requests=self._num_requests,
            num_finished=self._num_finished,
            attainment=self._num_met / count,
            ttft_attainment=self._num_ttft_met / count,
            tpot_attainment=self._num_tpot_met / count,
            ttft=self._ttft.percentiles(),
            tpot=self._tpot.percentiles(),
            itl=self.gaps.percentiles(),
            e2e=self._e2e.percentiles(),
            stage_shares={
                stage.value: seconds / total_s if total_s else 0.0 for stage, seconds in self._stages.items()
            },
            prompt_tokens=PromptTokens(
                total=self._num_prompt_tokens,
                computed=sum(load.num_prefill_tokens_total for load in loads),
                cached=sum(load.num_prefix_hits_total for load in loads),
                pulled=sum(load.num_prefix_pulled_total for load in loads),
                from_host=sum(load.num_prefix_from_host_total for load in loads),
                loaded=sum(load.num_prefix_loaded_total for load in loads),
            ),
            num_preemptions=sum(load.num_preemptions_total for load in loads),
            span_s=span_s,
            output_tokens_per_s=self._num_output_tokens / span_s if span_s else 0.0,
            kv=tuple(kv),
            num_refused=self._num_refused,
            paths=PathUse.of(self._paths),
            classes=tuple(tally.report(name) for name, tally in sorted(self._classes.items())),
        )
