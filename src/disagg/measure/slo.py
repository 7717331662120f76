"""Latency objectives, and how people write them."""

import math
import re
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.base.objectives import Objectives

_UNIT_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_OBJECTIVE: Final = re.compile(r"([a-z]\w*)\s*(?:=\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)|:\s*(\d+(?:\.\d+)?))")
_NAMES: Final = ("ttft", "tpot")
_LONGEST_S: Final = 86_400.0


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """The latencies in seconds that a request must keep, both of them. A missing one is always kept."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def is_met(self, ttft_s: float, tpot_s: float) -> bool:
        """Return whether a finished request with these latencies keeps both; NaN for the TPOT of a single token."""
        return self.keeps_ttft(ttft_s) and self.keeps_tpot(tpot_s)

    def keeps_ttft(self, ttft_s: float) -> bool:
        """Return whether the first token came in time; NaN, no token at all, did not."""
        return ttft_s <= self.ttft_s

    def keeps_tpot(self, tpot_s: float) -> bool:
        """Return whether the tokens came fast enough; NaN, an answer without gaps, did."""
        return not tpot_s > self.tpot_s

    def objectives(self) -> Objectives:
        """Return them as instances are told."""
        return Objectives(
            ttft_s=None if math.isinf(self.ttft_s) else self.ttft_s,
            tpot_s=None if math.isinf(self.tpot_s) else self.tpot_s,
        )

    def scaled(self, factor: float) -> "Slo":
        """Return objectives looser by ``factor``: DistServe's SLO scale (section 6.2)."""
        return Slo(ttft_s=self.ttft_s * factor, tpot_s=self.tpot_s * factor)

    def __str__(self) -> str:
        limits = {"ttft": self.ttft_s, "tpot": self.tpot_s}
        parts = [f"{name}={limit_s * 1e3:.4g}ms" for name, limit_s in limits.items() if limit_s < math.inf]
        return ",".join(parts) or "none"


def parse_slo(text: str) -> Slo:
    """Read ``ttft=250ms,tpot=100ms`` or, in the words of ``vllm bench serve --goodput``, ``ttft:250 tpot:100`` (ms).

    Raises ConfigurationError when it is neither, names an objective twice, or one that is 0 or over a day.
    """
    refusal = f"{text!r} is not a pair of objectives such as ttft=250ms,tpot=100ms, or ttft:250 tpot:100 in ms"
    limits: dict[str, float] = {}
    for part in re.split(r"[,\s]+(?=[a-z])", text.strip()):
        match = _OBJECTIVE.fullmatch(part)
        if match is None or match[1] in limits:
            raise ConfigurationError(refusal)
        name, unit = match[1], match[3] or "ms"
        if name not in _NAMES:
            raise ConfigurationError(f"{refusal}: no objective is called {name!r}; {known_names(name, _NAMES)}")
        if unit not in _UNIT_S:
            raise ConfigurationError(f"{refusal}: no unit is called {unit!r}; {known_names(unit, _UNIT_S)}")
        limits[name] = float(match[2] or match[4]) * _UNIT_S[unit]
        if not 0 < limits[name] <= _LONGEST_S:
            raise ConfigurationError(f"{refusal}: {limits[name]:g} s for {name} cannot be: above 0, at most a day")
    return Slo(ttft_s=limits.get("ttft", math.inf), tpot_s=limits.get("tpot", math.inf))
