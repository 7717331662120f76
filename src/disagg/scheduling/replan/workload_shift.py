"""Whether the workload has moved: three tests of the latest requests against those that the placement was planned for.

Lengths of prompts (what had to be computed of them: prefix hits count) and of answers by the two-sample Kolmogorov-
Smirnov test, with the asymptotic distribution of its statistic; the rate by the difference of the logarithms of the
mean gaps, whose variance is that of a renewal process (for a Poisson process the usual test of two rates; bursts
widen it). All three at level ``LEVEL``: they are made again and again. Pure.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from disagg.scheduling.dispatch.sequence_sample import SequenceSample

LEVEL: Final = 1e-4
"""Chance of a false alarm of one test of one quantity."""
_NORMAL_QUANTILE: Final = 3.891
"""Of the standard normal distribution, at ``1 - LEVEL / 2``."""
_KOLMOGOROV_QUANTILE: Final = math.sqrt(-math.log(LEVEL / 2) / 2)


def arrival_shift(before: Sequence[SequenceSample], after: Sequence[SequenceSample]) -> str:
    """Return in words what has moved of prompts and rate, with the figures; empty where nothing has."""
    prompts = [[one.num_computed_tokens for one in sample] for sample in (before, after)]
    found = [_length_shift("prompt tokens to compute", *prompts), _rate_shift(before, after)]
    return "; ".join(words for words in found if words)


def answer_shift(before: Sequence[SequenceSample], after: Sequence[SequenceSample]) -> str:
    """Return the same of the answers: of samples that have ended, as the short ones of a sample end first."""
    return _length_shift("answer tokens", *([one.num_answer_tokens for one in sample] for sample in (before, after)))


def kolmogorov_smirnov(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the largest distance between the distributions of two samples, neither of them empty."""
    one, other = sorted(first), sorted(second)
    here = there = 0
    largest = 0.0
    while here < len(one) and there < len(other):
        value = min(one[here], other[there])
        while here < len(one) and one[here] == value:
            here += 1
        while there < len(other) and other[there] == value:
            there += 1
        largest = max(largest, abs(here / len(one) - there / len(other)))
    return largest


def _length_shift(what: str, before: Sequence[int], after: Sequence[int]) -> str:
    distance = kolmogorov_smirnov(before, after)
    critical = _KOLMOGOROV_QUANTILE * math.sqrt(1 / len(before) + 1 / len(after))
    if distance <= critical:
        return ""
    means = f"mean {sum(before) / len(before):.0f} -> {sum(after) / len(after):.0f}"
    return f"{what}: {means}, distance {distance:.2f} over {critical:.2f}"


def _rate_shift(before: Sequence[SequenceSample], after: Sequence[SequenceSample]) -> str:
    old, new = _gaps(before), _gaps(after)
    old_mean, new_mean = sum(old) / len(old), sum(new) / len(new)
    if not old_mean or not new_mean:
        return ""
    # Of the burstier sample: one that happens to hold few bursts says too little of how they vary.
    variation = max(_variation(old, old_mean), _variation(new, new_mean))
    deviation = math.sqrt(variation * (1 / len(old) + 1 / len(new)))
    score = abs(math.log(old_mean / new_mean)) / deviation if deviation else 0.0
    if score <= _NORMAL_QUANTILE:
        return ""
    return f"requests/s: {1 / old_mean:.2f} -> {1 / new_mean:.2f}, score {score:.1f} over {_NORMAL_QUANTILE:.1f}"


def _gaps(sample: Sequence[SequenceSample]) -> list[float]:
    times = sorted(one.arrival_s for one in sample)
    return [later - earlier for earlier, later in pairwise(times)]


def _variation(gaps: Sequence[float], mean: float) -> float:
    """Return the squared coefficient of variation, at least that of a Poisson process."""
    return max(1.0, sum((gap - mean) ** 2 for gap in gaps) / len(gaps) / mean**2)
