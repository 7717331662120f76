"""``run_load``: one run from plan to records.

``run_load`` blocks until the run has ended, by itself, by one of its limits or by Ctrl-C, and always returns what there
is. For the same requests on another server, call it with ``dataclasses.replace(plan, server=...)``; with one
``prompt_seed`` in both, the texts are the same too.
"""

import asyncio
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Final

import uvloop

from disagg.bench.client.calls import Chain, chains_of, num_users_of
from disagg.bench.client.connection import Address, ConnectionPool
from disagg.bench.client.inquiries import predictions, recent_requests, served_model
from disagg.bench.client.load_plan import LoadPlan
from disagg.bench.client.preparing import LoadPreparation
from disagg.bench.client.prompt_texts import PromptSource
from disagg.bench.client.running import LoadRun, Watch
from disagg.bench.client.stages import merge_stages
from disagg.measure.record import RequestRecord
from disagg.measure.statistics import Percentiles

MAX_CLIENT_CORES: Final = 0.8
MAX_LATENESS_S: Final = 0.010
"""Beyond these the client's own part shows in the figures."""


@dataclass(frozen=True)
class LoadResult:
    """What came of a run. Records are in the order of the load, one for each request, sent or not."""

    plan: LoadPlan
    model: str
    """The name that the server was asked for."""
    records: tuple[RequestRecord, ...]
    wall_s: float
    """From the first request's time to the end of the last, or to the moment the run was given up."""
    client_cpu_s: float
    """CPU time of this process in the run."""
    loop_lag: Percentiles
    """How late the client's event loop was for its own timer, in seconds: stamps can be late by as much."""
    started_unix_s: float
    prompt_seed: int
    """With it in the plan, a run sends the same texts again."""
    stopped: str = ""
    """Why the run ended before all requests did; empty when it did not."""
    notes: tuple[str, ...] = ()
    """What a reader should know: lengths that the server counts otherwise, answers that are too short."""

    @property
    def client_cores(self) -> float:
        """CPU time of the client over the run's time: 1 is one core kept busy."""
        return self.client_cpu_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def lateness(self) -> Percentiles:
        """How late the client sent, in seconds."""
        return Percentiles.of([record.lateness_s for record in self.records])

    def client_faults(self) -> list[str]:
        """Return in words where the client was too slow for its figures to be the server's; mostly nothing."""
        faults = []
        if self.client_cores > MAX_CLIENT_CORES:
            faults.append(f"the client kept {self.client_cores:.2f} of a core busy: its own limit is near")
        if self.lateness.p99 > MAX_LATENESS_S:
            faults.append(f"the client sent late: by {self.lateness.p99 * 1e3:.0f} ms at P99")
        if self.loop_lag.p99 > MAX_LATENESS_S:
            faults.append(
                f"the client was kept from its core: stamps are late by up to {self.loop_lag.p99 * 1e3:.0f} ms"
            )
        return faults


def run_load(plan: LoadPlan, source: PromptSource, watch: Watch | None = None) -> LoadResult:
    """Try the server, make the prompts, send the load, and return what came of it; ``watch`` is called now and then.

    Raises UnavailableError when no server answers, DisaggError with the server's words when it refuses the first
    request, ConfigurationError when the plan cannot be. Later failures are records.
    """
    chains = chains_of(plan.load)
    model = plan.server.model or served_model(plan.server)
    before = predictions(plan.server)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result = runner.run(_prepare_and_run(plan, model, source, chains, watch))
    records = merge_stages(result.records, recent_requests(plan.server))
    notes = (*result.notes, *predictions(plan.server).since(before).words())
    return dataclasses.replace(result, records=tuple(records), notes=notes)


async def _prepare_and_run(
    plan: LoadPlan, model: str, source: PromptSource, chains: Sequence[Chain], watch: Watch | None
) -> LoadResult:
    calls = list(chain.from_iterable(one.calls for one in chains))
    pool = ConnectionPool(Address.of(plan.server.base_url))
    try:
        await pool.open()
        preparation = LoadPreparation(plan, model, source)
        await preparation.try_server(pool, islice(calls, max(1, plan.num_warmup)))
        run = LoadRun(preparation.attempts(calls), plan.limits, pool, watch)
        with _steady_heap():
            await run.drive(chains, num_users_of(plan.load))
    finally:
        pool.close()
    return LoadResult(
        plan=plan,
        model=model,
        records=run.records(),
        wall_s=run.wall_s,
        client_cpu_s=run.cpu_s,
        loop_lag=Percentiles.of(run.lags),
        started_unix_s=run.started_unix_s,
        prompt_seed=preparation.prompt_seed,
        stopped=run.stopped,
        notes=(*preparation.notes, *run.notes()),
    )


@contextmanager
def _steady_heap() -> Iterator[None]:
    """Keep the garbage collector from walking through all prepared requests in the middle of a run."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
