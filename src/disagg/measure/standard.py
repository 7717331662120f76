"""Four workloads that everybody can run: lengths and burstiness of public traces, cut to what two cores serve.

The lengths are fitted to the traces (``lengths.LengthDistribution.fit``, over the first half of each) and carried here
as figures; with the trace file at hand the same requests are replayed exactly.
"""

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.lengths import DrawnLengths, LengthDistribution
from disagg.measure.open_loop import LengthLimits, OpenLoop, RequestSource
from disagg.measure.slo import Slo
from disagg.measure.trace import Trace


class SloKind(enum.Enum):
    """How much slower than on an idle machine an answer may be."""

    TIGHT = "tight"
    LOOSE = "loose"


_SLO_FACTORS: Final = {SloKind.TIGHT: (5.0, 1.5), SloKind.LOOSE: (25.0, 4.0)}
"""Times the unloaded TTFT at the median prompt, and times the unloaded TPOT."""


def slo_from_unloaded(kind: SloKind, ttft_s: float, tpot_s: float) -> Slo:
    """Return objectives from the latencies of single requests of median length on an idle server."""
    ttft_factor, tpot_factor = _SLO_FACTORS[kind]
    return Slo(ttft_s=ttft_s * ttft_factor, tpot_s=tpot_s * tpot_factor)


@dataclass(frozen=True, slots=True)
class StandardWorkload:
    """A trace's shape. ``length_factor`` and ``limits`` make it fit a small machine."""

    name: str
    trace_file: str
    """Its name among the trace files, less the ending."""
    source: str
    lengths: LengthDistribution
    arrivals: ArrivalKind
    gap_cv: float
    length_factor: float
    limits: LengthLimits
    longest_answer: int | None = None
    """Rows of the trace with longer answers are left out."""


STANDARD_WORKLOADS: Final = {
    workload.name: workload
    for workload in (
        StandardWorkload(
            name="chat",
            trace_file="azure2023_conv",
            source="Azure LLM inference trace 2023, conversation (Patel et al., Splitwise, ISCA 2024; CC-BY-4.0)",
            lengths=LengthDistribution(
                prompt_quantiles=(2, 39, 181, 310, 389, 406, 944, 1033, 1080, 1142, 1322, 4076, 4086, 4123, 14050),
                output_quantiles=(7, 16, 38, 49, 71, 87, 100, 134, 198, 390, 403, 427, 460, 610, 1000),
                correlation=-0.02,
            ),
            arrivals=ArrivalKind.POISSON,
            gap_cv=1.0,
            length_factor=0.5,
            limits=LengthLimits(max_prompt_len=2048, max_output_len=512),
        ),
        StandardWorkload(
            name="code",
            trace_file="azure2023_code",
            source="Azure LLM inference trace 2023, code (Patel et al., Splitwise, ISCA 2024; CC-BY-4.0)",
            lengths=LengthDistribution(
                prompt_quantiles=(3, 17, 76, 147, 374, 768, 1060, 1460, 1880, 2410, 3148, 5012, 7315, 7436, 7437),
                output_quantiles=(6, 6, 6, 7, 8, 9, 11, 13, 16, 19, 28, 53, 85, 247, 1899),
                correlation=-0.01,
            ),
            # The variance of its counts per second is 13.9 times their mean, and a renewal process tends to CV squared.
            arrivals=ArrivalKind.GAMMA,
            gap_cv=3.7,
            length_factor=0.5,
            limits=LengthLimits(max_prompt_len=4096, max_output_len=256),
        ),
        StandardWorkload(
            name="summarise",
            trace_file="lengths_arxiv_summarization",
            source="arXiv summarisation lengths (Agrawal et al., Vidur, MLSys 2024; MIT)",
            lengths=LengthDistribution(
                prompt_quantiles=(1, 613, 1113, 1475, 1913, 2238, 2525, 2778, 3035, 3279, 3510, 3715, 3822, 3936, 4046),
                output_quantiles=(5, 35, 59, 77, 102, 121, 141, 161, 184, 210, 248, 314, 390, 649, 1022),
                correlation=-0.02,
            ),
            arrivals=ArrivalKind.POISSON,
            gap_cv=1.0,
            length_factor=0.5,
            limits=LengthLimits(max_prompt_len=2048, max_output_len=512),
            longest_answer=1024,
        ),
        StandardWorkload(
            name="reason",
            trace_file="servegen_deepseek_r1",
            source="ServeGen, DeepSeek-R1 service (Xiang et al., ServeGen, arXiv 2505.09999; Apache-2.0)",
            lengths=LengthDistribution(
                prompt_quantiles=(4, 9, 45, 120, 162, 252, 264, 275, 356, 376, 531, 2108, 9167, 27601, 55952),
                output_quantiles=(29, 106, 160, 221, 300, 364, 418, 472, 544, 686, 940, 1386, 1983, 8741, 27273),
                correlation=0.06,
            ),
            arrivals=ArrivalKind.POISSON,
            gap_cv=1.0,
            length_factor=0.5,
            limits=LengthLimits(max_prompt_len=2048, max_output_len=1024),
        ),
    )
}


def standard_workload(
    name: str, rate: float, num_requests: int, traces: Path | None = None, first: int = 0
) -> OpenLoop:
    """Return a standard workload at ``rate`` requests/s: drawn, or replayed from the files in ``traces``.

    What is replayed begins with the trace's request at ``first``.

    Raises ConfigurationError when no workload has that name, or its file is not there.
    """
    workload = STANDARD_WORKLOADS.get(name)
    if workload is None:
        raise ConfigurationError(f"no workload is called {name!r}; {known_names(name, STANDARD_WORKLOADS)}")
    if traces is None:
        source: RequestSource = DrawnLengths(name, workload.lengths, num_requests)
        arrivals = Arrivals(workload.arrivals, rate, workload.gap_cv)
    else:
        source = _replayed(workload, traces, num_requests, first)
        has_times = source.rate == source.rate
        arrivals = Arrivals(ArrivalKind.REPLAY if has_times else workload.arrivals, rate, workload.gap_cv)
    return OpenLoop(source, arrivals, workload.limits, workload.length_factor)


def _replayed(workload: StandardWorkload, traces: Path, num_requests: int, first: int) -> RequestSource:
    path = traces / f"{workload.trace_file}.jsonl.gz"
    if not path.exists():
        raise ConfigurationError(f"{path} is not there: the workload {workload.name} replays it; leave out --traces")
    return Trace(path, num_requests, first=first, longest_answer=workload.longest_answer)
