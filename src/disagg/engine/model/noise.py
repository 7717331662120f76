"""Random numbers that are a function of (seed, position, token): the same on every device, in every batch.

SplitMix64 (Steele, Lea and Flood 2014): the generator's state after n steps is ``key + n * GAMMA``, so that the noise
of any token is found without drawing that of the others.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

_GAMMA: Final = 0x9E3779B97F4A7C15
SEED_MASK: Final = (1 << 64) - 1
"""The bits of a seed that count."""
_GAMMA_ARRAY: Final = np.uint64(_GAMMA)


def noise_key(seed: int, position: int) -> int:
    """Return the 64-bit key of one position of one sequence."""
    return _mix(_mix(seed + _GAMMA) + position * _GAMMA)


def uniform(keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return uniform numbers strictly between 0 and 1, one for each (key, counter)."""
    return ((_bits(keys, counters) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _bits(keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's outputs."""
    bits: npt.NDArray[np.uint64] = keys + counters.astype(np.uint64) * _GAMMA_ARRAY
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def race_times(numbers: npt.NDArray[np.float64], logprobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return E / p, where uniform ``numbers`` make E exponential: a token is the first with its probability p.

    Infinite where p is 0.
    """
    with np.errstate(divide="ignore"):
        times: npt.NDArray[np.float64] = -np.log(numbers) / np.exp(logprobs)
    return times


@dataclass(frozen=True, slots=True)
class TokenArrivals:
    """Some arrivals of each of B keys, see ``arrivals``: float64 [B, n] times, int64 tokens, float64 marks."""

    times: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]
    marks: npt.NDArray[np.float64]


def arrivals(
    keys: npt.NDArray[np.uint64], vocab_size: int, bound: float, since: npt.NDArray[np.float64], first: int, count: int
) -> TokenArrivals:
    """Return arrivals ``first`` to ``first + count`` of each key; ``since`` [B] is when the one before came, or 0.

    Each token has a Poisson process of rate ``bound``. Of a token with probability p <= bound, arrivals with
    mark * bound < p are accepted, so that the first of these comes after an exponential time of rate p: the thinning
    of Lewis and Shedler (1979). All tokens together have few arrivals before the winner's time, and only they are
    looked at.
    """
    numbers = -1 - 2 * np.arange(first, first + count)
    gaps = -np.log(uniform(keys[:, None], numbers)) / (bound * vocab_size)
    gaps[:, 0] += since
    bits = _bits(keys[:, None], numbers - 1)
    tokens = ((bits >> np.uint64(32)) * np.uint64(vocab_size)) >> np.uint64(32)
    marks = ((bits & np.uint64(0xFFFFFFFF)).astype(np.float64) + 0.5) * 2.0**-32
    return TokenArrivals(gaps.cumsum(axis=1), tokens.astype(np.int64), marks)


def num_arrivals(vocab_size: int, bound: float) -> int:
    """Return how many arrivals nearly always reach past the winner's time, which is about 1."""
    return 8 + math.ceil(4 * bound * vocab_size)


def _mix(value: int) -> int:
    """SplitMix64's finaliser, on one integer."""
    value &= SEED_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return value ^ (value >> 31)
