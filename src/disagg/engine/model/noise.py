"""Random numbers that are a function of (seed, position, token): the same on every device, in every batch.

SplitMix64 (Steele, Lea and Flood 2014): the generator's state after n steps is ``key + n * GAMMA``, so that the noise
of any token is found without drawing that of the others.
"""

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
    bits = keys + counters.astype(np.uint64) * _GAMMA_ARRAY
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def gumbel(keys: npt.NDArray[np.uint64], counters: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return standard Gumbel noise: argmax(log p + noise) is distributed as p."""
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform(keys, counters)))
    return noise


def _mix(value: int) -> int:
    """SplitMix64's finaliser, on one integer."""
    value &= SEED_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return value ^ (value >> 31)
