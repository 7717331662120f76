"""What came out of one run of a load client: latencies, attainment, throughput, failures, and the client's own part."""

from collections import Counter
from collections.abc import Sequence
from itertools import chain

import msgspec

from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo
from disagg.measure.statistics import Percentiles, Share
from disagg.measure.timeline import Stage


class RunSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Attainment counts every request of the workload: what was refused, failed or unfinished is a miss."""

    slo: Slo
    num_requests: int
    num_finished: int
    errors: dict[str, int]
    """How many requests ended in which way other than well, by kind."""
    span_s: float
    """From the first request's due time to the last one's end."""
    offered_rate: float
    """Requests/s that the workload asked for; NaN where it says no times, as with a closed loop."""
    request_rate: float
    """Requests/s that finished."""
    output_tokens_per_s: float
    total_tokens_per_s: float
    """Prompt and output tokens of the finished requests."""
    attainment: Share
    ttft_attainment: Share
    tpot_attainment: Share
    ttft: Percentiles
    tpot: Percentiles
    itl: Percentiles
    e2e: Percentiles
    longest_gap: Percentiles
    """Of each answer's longest gap: what a reader sees as a stall."""
    pauses: Percentiles
    """Of requests that lost their instance: how long they were without one, where the server tells it."""
    lateness: Percentiles
    """How late the client sent. A client that is late measures itself."""
    stage_shares: dict[str, float]
    """Part of all requests' time that each stage took, where the server tells it."""

    @property
    def good_rate(self) -> float:
        """Requests/s that finished and kept both objectives: what ``vllm bench serve`` calls request goodput."""
        return self.attainment.count / self.span_s if self.span_s > 0 else 0.0

    def percentiles(self) -> dict[str, Percentiles]:
        """Return the latencies by the names that a target calls them."""
        return {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl, "e2e": self.e2e}


def summarize(records: Sequence[RequestRecord], slo: Slo, *, is_open_loop: bool = True) -> RunSummary:
    """Return the summary of all requests of a run, in any order."""
    finished = [record for record in records if record.ending is Ending.FINISHED]
    started_s = min((record.due_s for record in records), default=0.0)
    last_due_s = max((record.due_s for record in records), default=0.0)
    ended_s = max((record.finished_s for record in finished), default=last_due_s)
    span_s = ended_s - started_s
    offered_s = last_due_s - started_s
    num_output_tokens = sum(record.num_output_tokens for record in finished)
    latencies = latency_percentiles(records)
    num_prompt_tokens = sum(record.prompt_len for record in finished)
    return RunSummary(
        slo=slo,
        num_requests=len(records),
        num_finished=len(finished),
        errors=dict(Counter(_kind(record) for record in records if record.ending is not Ending.FINISHED)),
        span_s=span_s,
        offered_rate=(len(records) - 1) / offered_s if is_open_loop and offered_s > 0 else float("nan"),
        request_rate=_per_s(len(finished), span_s),
        output_tokens_per_s=_per_s(num_output_tokens, span_s),
        total_tokens_per_s=_per_s(num_output_tokens + num_prompt_tokens, span_s),
        attainment=Share.that(record.meets(slo) for record in records),
        ttft_attainment=Share.that(
            record.ending is Ending.FINISHED and slo.keeps_ttft(record.ttft_s) for record in records
        ),
        tpot_attainment=Share.that(record.ending is Ending.FINISHED and record.keeps_tpot(slo) for record in records),
        ttft=latencies["ttft"],
        tpot=latencies["tpot"],
        itl=latencies["itl"],
        e2e=latencies["e2e"],
        longest_gap=Percentiles.of([max(record.gaps_s) for record in finished if record.gaps_s]),
        pauses=Percentiles.of(
            [pause_s for record in finished if (pause_s := record.stages.get(Stage.PAUSE.value, 0.0))]
        ),
        lateness=Percentiles.of([record.lateness_s for record in records]),
        stage_shares=_stage_shares(finished),
    )


def latency_percentiles(records: Sequence[RequestRecord]) -> dict[str, Percentiles]:
    """Return those of the finished requests, by the names that a target calls the latencies."""
    finished = [record for record in records if record.ending is Ending.FINISHED]
    return {
        "ttft": Percentiles.of([record.ttft_s for record in finished]),
        "tpot": Percentiles.of([record.tpot_s for record in finished]),
        "itl": Percentiles.of(list(chain.from_iterable(record.gaps_s for record in finished))),
        "e2e": Percentiles.of([record.e2e_s for record in finished]),
    }


def _kind(record: RequestRecord) -> str:
    return record.error or record.ending.value


def _per_s(count: int, span_s: float) -> float:
    return count / span_s if span_s > 0 else 0.0


def _stage_shares(records: Sequence[RequestRecord]) -> dict[str, float]:
    seconds: Counter[str] = Counter()
    for record in records:
        seconds.update(record.stages)
    total_s = sum(seconds.values())
    return {stage: value / total_s for stage, value in seconds.items()} if total_s > 0 else {}
