"""Sizes and lists of numbers as people write them."""

from collections.abc import Sequence


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
