"""Runs to report on without a server: two devices that serve whole requests, or one that prefills and one that decodes.

Prefill takes time for each token, a decode step a constant and a little for each answer. A device that does both
prefills first, so that every prompt stalls its answers.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from disagg.bench.report.runs import Load, SystemRun
from disagg.measure.machine import Machine
from disagg.measure.record import Ending, RequestRecord
from disagg.measure.slo import Slo

PREFILL_S = 0.35e-3
STEP_S, STEP_S_PER_ANSWER = 12e-3, 0.8e-3
HAND_OVER_S = 4e-3
SLO = Slo(ttft_s=0.8, tpot_s=0.05)
MACHINE = Machine(
    processor="A processor",
    num_cores=2,
    instruction_sets=("avx2", "fma"),
    memory_bytes=8 << 30,
    kernel="Linux 6.1",
    python="3.11.7",
    packages={"torch": "2.13.0"},
)


@dataclass
class Request:
    index: int
    sent_s: float
    prompt_len: int
    output_len: int
    started_s: float = 0.0
    ready_s: float = 0.0
    events: list[float] = field(default_factory=list)


def requests(rate: float, count: int, seed: int) -> list[Request]:
    rng, now, made = random.Random(seed), 0.0, []
    for index in range(count):
        now += rng.expovariate(rate)
        prompt_len = min(2000, max(30, int(rng.lognormvariate(6.0, 0.8))))
        made.append(Request(index, now, prompt_len, min(200, max(4, int(rng.lognormvariate(4.0, 0.6))))))
    return made


def colocated(work: list[Request], num_devices: int = 2) -> list[Request]:
    for device in range(num_devices):
        _serve(work[device::num_devices], does_prefill=True)
    return work


def disaggregated(work: list[Request]) -> list[Request]:
    free_s = 0.0
    for request in work:
        request.started_s = max(free_s, request.sent_s)
        free_s = request.started_s + PREFILL_S * request.prompt_len
        request.events.append(free_s)
        request.ready_s = free_s + HAND_OVER_S
    _serve(sorted(work, key=lambda request: request.ready_s), does_prefill=False)
    return work


def _serve(work: list[Request], *, does_prefill: bool) -> None:
    """One device: waiting requests first (their prefill, or nothing but their arrival), then a token for everyone."""
    waiting, running, now = list(work), list[Request](), 0.0
    while waiting or running:
        arrival_s = (waiting[0].sent_s if does_prefill else waiting[0].ready_s) if waiting else float("inf")
        if not running:
            now = max(now, arrival_s)
        if arrival_s <= now:
            request = waiting.pop(0)
            if does_prefill:
                request.started_s = now
                now += PREFILL_S * request.prompt_len
                request.events.append(now)
                request.ready_s = now
            running.append(request)
            continue
        now += STEP_S + STEP_S_PER_ANSWER * len(running)
        for request in running:
            request.events.append(now)
        running = [request for request in running if len(request.events) < request.output_len]


def record(request: Request, *, has_stages: bool = True) -> RequestRecord:
    first, last = request.events[0], request.events[-1]
    stages = {
        "queue_prefill": request.started_s - request.sent_s,
        "prefill": first - request.started_s,
        "hand_over": request.ready_s - first,
        "decode": last - request.ready_s,
    }
    return RequestRecord(
        index=request.index,
        request_id=f"r{request.index}",
        prompt_len=request.prompt_len,
        max_output_len=request.output_len,
        due_s=request.sent_s,
        sent_s=request.sent_s,
        finished_s=last,
        event_s=tuple(request.events),
        event_tokens=(1,) * len(request.events),
        ending=Ending.FINISHED,
        stages=stages if has_stages else {},
    )


def run(system: str, rate: float, *, count: int = 60, seed: int = 0, slo: Slo = SLO) -> SystemRun:
    serve = {"colocated": colocated, "disaggregated": disaggregated, "two devices": colocated}[system]
    served = serve(requests(rate, count, seed))
    return SystemRun(
        system=system,
        workload="chat",
        load=Load(rate=rate),
        seed=seed,
        num_devices=2,
        slo=slo,
        records=tuple(record(request) for request in served),
        settings={"Command": f"disagg serve --{system} 2"},
        machine=MACHINE,
        client_cores=0.04,
    )


def all_runs(*rates: float, seeds: int = 1, count: int = 60) -> Iterator[SystemRun]:
    for system in ("colocated", "disaggregated"):
        for rate in rates:
            for seed in range(seeds):
                yield run(system, rate, seed=seed, count=count)
