"""Sizes and lists of numbers as people write them."""

import re
from collections.abc import Sequence
from typing import Final

from disagg.base.errors import ConfigurationError

_UNITS: Final = {"": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("", 1024), ("iB", 1024), ("B", 1000))
}
_MANY_BYTES: Final = 1 << 60


def parse_bytes(text: str) -> int:
    """Return the bytes of a size: 536870912, 512MiB, 2GiB, 0.5G. K and KiB are powers of 1024, KB of 1000.

    Raises ConfigurationError when it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?(?:i?B)?)", text.strip(), re.IGNORECASE)
    unit = _UNITS.get(_canonical_unit(match[2])) if match else None
    if match is None or unit is None:
        raise ConfigurationError(f"{text!r} is not a size: write bytes, or a number with KiB, MiB, GiB or TiB")
    num_bytes = float(match[1]) * unit
    if num_bytes >= _MANY_BYTES:
        raise ConfigurationError(f"{text!r} is more than any machine has")
    return int(num_bytes)


def _canonical_unit(unit: str) -> str:
    return unit.upper().replace("IB", "iB").removeprefix("B")


def format_bytes(num_bytes: float) -> str:
    """Return a size as a person writes it: 1GiB, 98.5MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(num_bytes, 1) < 1024:
            return f"{num_bytes:.1f}".removesuffix(".0") + unit
        num_bytes /= 1024
    return f"{num_bytes:.1f}".removesuffix(".0") + "TiB"


def format_ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers with runs of more than two as ranges: 0,1,4-7."""
    words: list[str] = []
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1:
            run = [str(number) for number in numbers[start:end]]
            words += run if len(run) < 3 else [f"{run[0]}-{run[-1]}"]
            start = end
    return ",".join(words)
