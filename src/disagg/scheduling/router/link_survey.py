"""Which links between instances are measured, when, and what is made of the figures. Pure.

A prefill instance's pool is read by those that go on with its sequences. Each such link is measured when both ends take
requests, one link after the other, so that no measurement disturbs another.
"""

from collections.abc import Collection, Iterable
from itertools import islice
from typing import Final, NamedTuple

import msgspec

from disagg.base.ids import InstanceId
from disagg.base.messages import LinkFigure, LinkMeasured
from disagg.base.request import Role
from disagg.base.units import format_bytes
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import LinkKnown
from disagg.scheduling.router.membership import Member
from disagg.scheduling.router.outputs import AskToMeasure, LinkFound

SLOW_SHARE: Final = 0.3
"""Of what the hardware gives: a link below is far under it. Half of it is lost to digests and system calls at times."""

MOST_LINKS: Final = 1024
"""Measured one after the other, more would take hours; nothing is known of the others."""


class LinkEnds(NamedTuple):
    """Who is read from, and who reads: two lives of instances."""

    source: InstanceId
    source_incarnation: str
    target: InstanceId
    target_incarnation: str


class MeasuredLink(msgspec.Struct, frozen=True, kw_only=True):
    """One link between two instances. ``warning`` is empty where nothing is wrong; None of a figure: not yet."""

    source: InstanceId
    target: InstanceId
    figure: LinkFigure | None = None
    warning: str = ""


class LinkSurvey:
    """The links of a deployment. ``min_bytes_per_s`` is what is asked of each; 0 asks nothing.

    The instances of ``fleet`` have them. Unless it ``is_wanted``, nothing is asked for: others ask, and what they find
    is told here, too.
    """

    def __init__(self, min_bytes_per_s: int, fleet: Dispatcher, *, is_wanted: bool = True) -> None:
        self._fleet = fleet
        self._version = -1
        """Of the fleet whose links these are."""
        self._is_wanted = is_wanted
        self._min_bytes_per_s = min_bytes_per_s
        self._alive: dict[tuple[InstanceId, str], Member] = {}
        self._figures: dict[LinkEnds, LinkFigure | None] = {}
        self._under_way: LinkEnds | None = None

    @property
    def links(self) -> tuple[MeasuredLink, ...]:
        """All links of the instances that take requests, with what is known of them."""
        return tuple(
            MeasuredLink(
                source=ends.source, target=ends.target, figure=figure, warning="" if figure is None else warning(figure)
            )
            for ends, figure in self._figures.items()
        )

    def joined(self, member: Member, members: Iterable[Member]) -> tuple[AskToMeasure, ...]:
        """See ``next``. One that nobody can read has no links, and the others' stay what they are."""
        return self.next(members) if member.is_readable else ()

    def next(self, members: Iterable[Member]) -> tuple[AskToMeasure, ...]:
        """Return what lets the next link be measured; nothing while one is being measured, or when none is left."""
        if self._version != self._fleet.fleet_version:
            self._version = self._fleet.fleet_version
            self._alive = {(member.instance, member.incarnation): member for member in members if member.is_readable}
            self._figures = {ends: self._figures.get(ends) for ends in _wanted(self._alive.values())}
        if not self._is_wanted or self._under_way in self._figures:
            return ()
        self._under_way = next((ends for ends, figure in self._figures.items() if figure is None), None)
        if self._under_way is None:
            return ()
        source, incarnation, target, _ = self._under_way
        facts = self._alive[source, incarnation].facts
        assert facts is not None, "who takes requests has said what it is"
        return (
            AskToMeasure(instance=target, source=source, incarnation=incarnation, pool=facts.pool, access=facts.probe),
        )

    def take(self, measured: LinkMeasured) -> LinkFound | None:
        """Note what was found; None where nobody wants it any more."""
        ends = LinkEnds(measured.source, measured.source_incarnation, measured.instance, measured.incarnation)
        if ends == self._under_way:
            self._under_way = None
        if ends not in self._figures:
            return None
        figure = measured.figure
        self._figures[ends] = figure
        return LinkFound(
            source=ends.source,
            target=ends.target,
            figure=figure,
            warning=warning(figure),
            refusal=self._why_refused(ends, figure),
        )

    def begin_anew(self) -> None:
        """Let all links be measured once more."""
        self._figures = dict.fromkeys(self._figures)

    def _why_refused(self, link: LinkEnds, figure: LinkFigure) -> str:
        """Return why an instance with such a link cannot be accepted; an empty string where it can."""
        if not self._min_bytes_per_s:
            return ""
        wanted = f"--min-kv-bandwidth asks for {format_bytes(self._min_bytes_per_s)}/s"
        if figure.failure:
            return f"{link.target} cannot read KV blocks of {link.source} ({figure.failure}), and {wanted}"
        if figure.bytes_per_s >= self._min_bytes_per_s:
            return ""
        speed = f"{format_bytes(figure.bytes_per_s)}/s"
        found = f"{link.target} reads KV blocks of {link.source} over {figure.link} at {speed}"
        return f"{found}, and {wanted}: mend the network, choose another --kv-host, or ask for less"


def warning(figure: LinkFigure) -> str:
    """Return what is wrong with a link, in words; an empty string for nothing."""
    if figure.failure:
        return f"KV blocks cannot be read: {figure.failure}"
    if figure.bytes_per_s >= SLOW_SHARE * figure.limit_bytes_per_s:
        return ""
    return (
        f"{format_bytes(figure.bytes_per_s)}/s over {figure.link} is far under the "
        f"{format_bytes(figure.limit_bytes_per_s)}/s of {figure.limit}"
    )


def link_known(link: LinkFound, source: Member) -> LinkKnown:
    """Return what a figure means for a sequence's tokens."""
    assert source.facts is not None, "who is read from has said what it is"
    facts, figure = source.facts, link.figure
    token_bytes = facts.kv_bytes / facts.pool_tokens
    token_s = token_bytes / max(figure.bytes_per_s, 1.0)
    return LinkKnown(source=link.source, target=link.target, latency_s=figure.latency_s, token_s=token_s)


def _wanted(members: Collection[Member]) -> list[LinkEnds]:
    targets = [member for member in members if member.role is Role.DECODE]
    targets = targets or [member for member in members if member.role is Role.COLOCATED]
    ends = (
        LinkEnds(source.instance, source.incarnation, target.instance, target.incarnation)
        for source in members
        if source.role is Role.PREFILL
        for target in targets
    )
    return list(islice(ends, MOST_LINKS))
