"""Latency objectives, which part of the requests must keep them, and how people write both."""

import math
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.base.objectives import Objectives
from disagg.measure.statistics import Percentiles

_UNIT_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}
_OBJECTIVE: Final = re.compile(r"([a-z]\w*)\s*(?:=\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)|:\s*(\d+(?:\.\d+)?))")
_TAIL: Final = re.compile(r"([a-z]\w*)\.(p\d+)\s*<=?\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)")
_ATTAINMENT: Final = re.compile(r"(.*?)\s*@\s*(\d+(?:\.\d+)?)\s*%\s*", re.DOTALL)
_NAMES: Final = ("ttft", "tpot")
_TAIL_NAMES: Final = ("ttft", "tpot", "itl", "e2e")
_TAIL_PERCENTILES: Final = ("p50", "p90", "p99")
DEFAULT_ATTAINMENT: Final = 0.9
"""Part of all requests that must keep their objectives, unless said (DistServe, section 2.2)."""
_LONGEST_S: Final = 86_400.0
_ROUNDING: Final = 1e-9
"""99.9 / 100 is more than 999 / 1000."""


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

    @classmethod
    def of(cls, objectives: Objectives) -> "Slo":
        """Return what instances are told as it is measured."""
        return cls(ttft_s=objectives.ttft_s or math.inf, tpot_s=objectives.tpot_s or math.inf)

    def scaled(self, factor: float) -> "Slo":
        """Return objectives looser by ``factor``: DistServe's SLO scale (section 6.2)."""
        return Slo(ttft_s=self.ttft_s * factor, tpot_s=self.tpot_s * factor)

    def __str__(self) -> str:
        limits = {"ttft": self.ttft_s, "tpot": self.tpot_s}
        parts = [f"{name}={_words(limit_s)}" for name, limit_s in limits.items() if limit_s < math.inf]
        return ",".join(parts) or "none"


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """A limit in seconds on a percentile (``p50``, ``p90``, ``p99``) of ``ttft``, ``tpot``, ``itl`` or ``e2e``."""

    latency: str
    percentile: str
    limit_s: float

    def is_met(self, percentiles: Mapping[str, Percentiles]) -> bool:
        """Return whether the percentile is within the limit; where no request has the latency, it is."""
        return not getattr(percentiles[self.latency], self.percentile) > self.limit_s

    def __str__(self) -> str:
        return f"{self.latency}.{self.percentile}<={_words(self.limit_s)}"


class SloTarget(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment is held to: ``attainment`` of all requests keep ``slo``, and each of the ``tails`` is kept."""

    slo: Slo = Slo()
    attainment: float = DEFAULT_ATTAINMENT
    tails: tuple[Tail, ...] = ()

    def is_met(self, attainment: float, percentiles: Mapping[str, Percentiles]) -> bool:
        """Return whether a run keeps it; ``percentiles`` are those of its finished requests, by latency."""
        return not self.missed(attainment, percentiles)

    def missed(self, attainment: float, percentiles: Mapping[str, Percentiles]) -> tuple[str, ...]:
        """Return in words what of it a run does not keep; nothing where it keeps all."""
        words = []
        if attainment < self.attainment - _ROUNDING:
            words.append(f"attainment {attainment * 100:.4g}%, not {self.attainment * 100:.4g}%")
        for tail in self.tails:
            if not tail.is_met(percentiles):
                reached_s = getattr(percentiles[tail.latency], tail.percentile)
                words.append(f"{tail.latency}.{tail.percentile} {_words(reached_s)}, not <={_words(tail.limit_s)}")
        return tuple(words)

    def scaled(self, factor: float) -> "SloTarget":
        """Return objectives looser by ``factor``, to be kept by as many requests."""
        tails = tuple(msgspec.structs.replace(tail, limit_s=tail.limit_s * factor) for tail in self.tails)
        return SloTarget(slo=self.slo.scaled(factor), attainment=self.attainment, tails=tails)

    def __str__(self) -> str:
        return ",".join([f"{self.slo}@{self.attainment * 100:.4g}%", *map(str, self.tails)])


def parse_target(text: str, attainment: float = DEFAULT_ATTAINMENT) -> SloTarget:
    """Read ``ttft=250ms,tpot=100ms@90%``, with limits on percentiles such as ``ttft.p99<=2s`` among the objectives.

    ``attainment`` holds where the text says none. Raises ConfigurationError when it is not so written, or says
    something twice.
    """
    slo_parts, tails, said = [], [], None
    for part in _parts(text):
        match = _ATTAINMENT.fullmatch(part)
        if match is not None:
            if said is not None:
                raise ConfigurationError(f"{text!r} says twice which part of requests must keep it: write @90% once")
            said, part = float(match[2]) / 100, match[1]
        tail = _TAIL.fullmatch(part)
        if tail is None:
            slo_parts.append(part)
        else:
            tails.append(_tail(tail, text))
    if said is not None and not 0 < said <= 1:
        raise ConfigurationError(f"{text!r}: {said:.0%} of requests cannot be: above 0%, at most 100%")
    slo = parse_slo(",".join(slo_parts)) if slo_parts else Slo()
    return SloTarget(slo=slo, attainment=attainment if said is None else said, tails=tuple(tails))


def parse_slo(text: str) -> Slo:
    """Read ``ttft=250ms,tpot=100ms`` or, in the words of ``vllm bench serve --goodput``, ``ttft:250 tpot:100`` (ms).

    Raises ConfigurationError when it is neither, names an objective twice, or one that is 0 or over a day.
    """
    refusal = f"{text!r} is not a pair of objectives such as ttft=250ms,tpot=100ms, or ttft:250 tpot:100 in ms"
    limits: dict[str, float] = {}
    for part in _parts(text):
        match = _OBJECTIVE.fullmatch(part)
        if match is None or match[1] in limits:
            raise ConfigurationError(refusal)
        name, unit = match[1], match[3] or "ms"
        if name not in _NAMES:
            raise ConfigurationError(f"{refusal}: no objective is called {name!r}; {known_names(name, _NAMES)}")
        limits[name] = _seconds(match[2] or match[4], unit, name, refusal)
    return Slo(ttft_s=limits.get("ttft", math.inf), tpot_s=limits.get("tpot", math.inf))


def _words(limit_s: float) -> str:
    """Return a limit as it is read again: never with an exponent."""
    return f"{limit_s:.4g}s" if limit_s >= 9.9995 else f"{limit_s * 1e3:.4g}ms"


def _parts(text: str) -> list[str]:
    return re.split(r"[,\s]+(?=[a-z])", text.strip())


def _tail(match: re.Match[str], text: str) -> Tail:
    latency, percentile = match[1], match[2]
    refusal = f"{text!r} limits no percentile: write ttft.p99<=2s"
    if latency not in _TAIL_NAMES:
        raise ConfigurationError(f"{refusal}: no latency is called {latency!r}; {known_names(latency, _TAIL_NAMES)}")
    if percentile not in _TAIL_PERCENTILES:
        raise ConfigurationError(f"{refusal}: no {percentile}; {known_names(percentile, _TAIL_PERCENTILES)}")
    limit_s = _seconds(match[3], match[4], f"{latency}.{percentile}", refusal)
    return Tail(latency=latency, percentile=percentile, limit_s=limit_s)


def _seconds(number: str, unit: str, name: str, refusal: str) -> float:
    if unit not in _UNIT_S:
        raise ConfigurationError(f"{refusal}: no unit is called {unit!r}; {known_names(unit, _UNIT_S)}")
    limit_s = float(number) * _UNIT_S[unit]
    if not 0 < limit_s <= _LONGEST_S:
        raise ConfigurationError(f"{refusal}: {limit_s:g} s for {name} cannot be: above 0, at most a day")
    return limit_s
