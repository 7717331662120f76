"""Numbers as a reader wants them."""

import math
from collections.abc import Callable, Mapping
from typing import Final

from disagg.measure.slo import Slo

_MOST_TOLD: Final = 3


def seconds(value_s: float) -> str:
    """Return 3 significant digits with the unit that suits: ``38.2 ms``, ``1.24 s``; a dash for NaN."""
    if math.isnan(value_s):
        return "–"
    if abs(value_s) >= 0.9995:
        return f"{_significant(value_s)} s"
    return f"{_significant(value_s * 1e3)} ms" if abs(value_s) >= 0.9995e-3 else f"{_significant(value_s * 1e6)} µs"


def objective(limit_s: float) -> str:
    """Return a limit that somebody set, as short as it was set: ``50 ms``, ``1.5 s``."""
    return f"{limit_s:.3g} s" if limit_s >= 0.9995 else f"{limit_s * 1e3:.3g} ms"


def objectives(slo: Slo) -> str:
    """Return both objectives: ``TTFT ≤ 800 ms, TPOT ≤ 50 ms``."""
    limits = (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s))
    return ", ".join(f"{name} ≤ {objective(limit_s)}" for name, limit_s in limits if limit_s < math.inf) or "none"


def milliseconds(value_s: float) -> str:
    """Return milliseconds without their unit, for a column that names it; a dash for NaN."""
    return "–" if math.isnan(value_s) else _significant(value_s * 1e3)


def number(value: float) -> str:
    """Return 3 significant digits; a dash for NaN."""
    return "–" if math.isnan(value) else _significant(value)


def percent(share: float) -> str:
    """Return a share as a percentage without needless digits: ``93 %``, ``99.6 %``."""
    if math.isnan(share):
        return "–"
    value = share * 100
    return f"{value:.0f} %" if value in (0, 100) or 1 <= value < 99 else f"{value:.1f} %"


def ratio(value: float, reference: float) -> str:
    """Return ``×1.23``, or nothing where one of the two is missing or 0."""
    if math.isnan(value) or math.isnan(reference) or reference == 0:
        return ""
    times = value / reference
    return f"×{times:.2f}" if 0.095 <= times < 9.95 else f"×{times:.2g}" if times < 1 else f"×{times:,.0f}"


def by_system(values: Mapping[str, float], words: Callable[[float], str]) -> str:
    """Return what each system does, or of more than three the lowest and the highest: for titles."""
    shown = list(values)
    if len(shown) > _MOST_TOLD:
        shown = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
        return ", ".join(f"{words(values[system])} with {system}" for system in shown) + f"; {len(values) - 2} between"
    return ", ".join(f"{words(values[system])} with {system}" for system in shown)


def _significant(value: float) -> str:
    """Return 3 significant digits, never in powers of ten."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 6)}f}"
