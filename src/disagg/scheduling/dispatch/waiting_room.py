"""Sequences that wait in the router for their turn: in order of deadline, and fair between tenants. Pure.

Whose sequence comes next is decided by virtual token counters (VTC: Sheng et al., Fairness in Serving Large Language
Models, OSDI 2024, algorithm 2): each tenant's counter grows by the tokens that it was served, an output token counting
twice, over its weight; the lowest counter is served first. Whoever comes back after a while starts from those who are
there: nobody saves up. Lower priorities (numbers) go first whoever's they are.

Several routers tell each other what they have under way of each tenant, and what they served: that counts as if it were
done here, a little later.
"""

import bisect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from disagg.base.ids import RequestId, RouterId
from disagg.base.tenants import TenantSettings
from disagg.scheduling.dispatch.state import SequenceEntry
from disagg.scheduling.dispatch.tenant_shares import TenantShare

_OUTPUT_WEIGHT: Final = 2
"""Of an output token, in input tokens, as in the paper's evaluation."""


@dataclass(slots=True)
class _Tenant:
    weight: float
    served: float = 0.0
    """Tokens over weight, from a start that all have in common."""
    waiting: list[SequenceEntry] = field(default_factory=list)


def _rank(sequence: SequenceEntry) -> tuple[int, float, int]:
    return sequence.rank


class WaitingRoom:
    """Who waits. Of tenants without settings nothing is kept while none of their sequences is under way."""

    def __init__(self, tenants: Mapping[str, TenantSettings]) -> None:
        self._settings = tenants
        self._tenants: dict[str, _Tenant] = {}
        self._num_under_way: dict[str, int] = {}
        self._elsewhere: dict[RouterId, dict[str, int]] = {}
        """Of those under way, what is at other routers."""
        self._untold: dict[str, int] | None = None
        """Tokens that were served since others were told; None where nobody is."""
        self._num_all, self._weight_all = 0, 0.0
        """Of all tenants that have something under way."""
        self._last_served = 0.0
        """Of the tenant that left last."""
        self.num_waiting = self.num_tokens = 0
        """How many wait, and their tokens in sum."""

    def __len__(self) -> int:
        return self.num_waiting

    def num_under_way(self, tenant: str) -> int:
        """Return how many sequences of a tenant wait or are served, here and at other routers."""
        return self._num_under_way.get(tenant, 0)

    def num_here(self, tenant: str) -> int:
        """Return how many of them are here."""
        elsewhere = sum(there.get(tenant, 0) for there in self._elsewhere.values())
        return self.num_under_way(tenant) - elsewhere

    def presses(self, tenant: str, *, beside_guest: bool) -> bool:
        """Return whether a tenant has more under way than its share; with ``beside_guest`` one more tenant has one."""
        own = self.num_under_way(tenant)
        weights = self._weight_all + beside_guest
        return own > 1 and own * weights > self._num_all * self._weight_of(tenant)

    def somebody_presses(self) -> bool:
        """Return whether anybody has more under way than his share."""
        return any(self.presses(name, beside_guest=False) for name in self._num_under_way)

    def waiting_of(self, tenant: str) -> Sequence[SequenceEntry]:
        """Return a tenant's sequences that wait, in their order."""
        known = self._tenants.get(tenant)
        return () if known is None else known.waiting

    def _weight_of(self, tenant: str) -> float:
        settings = self._settings.get(tenant)
        return 1.0 if settings is None else settings.weight

    def enter(self, sequence: SequenceEntry) -> None:
        """Take in a sequence that has just arrived."""
        self._count(sequence.tenant, 1)
        self.wait(sequence)

    def _count(self, name: str, change: int) -> None:
        before = self.num_under_way(name)
        self._num_all += change
        if not before:
            self._weight_all += self._weight_of(name)
        if before + change:
            self._num_under_way[name] = before + change
            return
        del self._num_under_way[name]
        self._weight_all = self._weight_all - self._weight_of(name) if self._num_under_way else 0.0

    def wait(self, sequence: SequenceEntry) -> None:
        """Let a sequence that is under way wait for its turn."""
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            tenant = self._tenants[sequence.tenant] = _Tenant(self._weight_of(sequence.tenant))
        if not tenant.waiting:
            present = [other.served for other in self._tenants.values() if other.waiting]
            tenant.served = max(tenant.served, min(present, default=self._last_served))
        bisect.insort(tenant.waiting, sequence, key=_rank)
        self.num_waiting += 1
        self.num_tokens += sequence.num_tokens

    def stop_waiting(self, sequence: SequenceEntry) -> None:
        """Take out a sequence whose turn has come, or that nobody wants any more."""
        tenant = self._tenants[sequence.tenant]
        tenant.waiting.remove(sequence)
        self.num_waiting -= 1
        self.num_tokens -= sequence.num_tokens
        if not tenant.waiting:
            self._last_served = tenant.served

    def leave(self, sequence: SequenceEntry) -> None:
        """Forget a sequence that has ended; it does not wait any more."""
        name = sequence.tenant
        self._count(name, -1)
        if not self.num_here(name):
            tenant = self._tenants.get(name)
            if tenant is not None and name not in self._settings and tenant.served <= self._floor():
                del self._tenants[name]

    def served(self, sequence: SequenceEntry, *, num_input: int = 0, num_output: int = 0) -> None:
        """Count what was done for a sequence."""
        tenant, num_served = self._tenants[sequence.tenant], num_input + _OUTPUT_WEIGHT * num_output
        tenant.served += num_served / tenant.weight
        if self._untold is not None:
            self._untold[sequence.tenant] = self._untold.get(sequence.tenant, 0) + num_served

    def news(self) -> tuple[TenantShare, ...]:
        """Return what other routers are to know: who has something under way here, or was served since the last call.

        What was served is counted from the first call on.
        """
        served, self._untold = self._untold or {}, {}
        here = {name: self.num_here(name) for name in self._num_under_way}
        names = [name for name in {**here, **served} if here.get(name) or name in served]
        return tuple(TenantShare(name, here.get(name, 0), served.get(name, 0)) for name in names)

    def hear(self, router: RouterId, news: Sequence[TenantShare]) -> None:
        """Take another router's ``news``; none of a router that is gone."""
        before, there = self._elsewhere.pop(router, {}), {one.tenant: one.num_under_way for one in news}
        if there:
            self._elsewhere[router] = there
        for name in {**before, **there}:
            if change := there.get(name, 0) - before.get(name, 0):
                self._count(name, change)
        for one in news:
            if (tenant := self._tenants.get(one.tenant)) is not None:
                tenant.served += one.num_served / tenant.weight

    def head(self, but: Collection[RequestId] = ()) -> SequenceEntry | None:
        """Return the sequence whose turn is next, those named left out; None when there is none."""
        if not self.num_waiting:
            return None
        if not but and len(self._tenants) == 1:
            return next(iter(self._tenants.values())).waiting[0]
        firsts = []
        for tenant in self._tenants.values():
            first = next((one for one in tenant.waiting if one.request_id not in but), None)
            if first is not None:
                priority, rank_s, order = first.rank
                firsts.append(((priority, tenant.served, rank_s, order), first))
        return min(firsts, key=lambda pair: pair[0], default=(None, None))[1]

    def ahead_of(self, sequence: SequenceEntry) -> Iterator[tuple[SequenceEntry, float]]:
        """Yield its own tenant's sequences that are served before it, each with how many tenants share meanwhile.

        Others' sequences count as far as fairness lets them in between.
        """
        present = [tenant for tenant in self._tenants.values() if tenant.waiting]
        own = self._tenants.get(sequence.tenant)
        if own is None or not own.waiting:
            own = _Tenant(self._weight_of(sequence.tenant))
            present.append(own)
        share = sum(tenant.weight for tenant in present) / own.weight
        for one in own.waiting:
            if one.rank < sequence.rank:
                yield one, share

    def _floor(self) -> float:
        return min((tenant.served for tenant in self._tenants.values() if tenant.waiting), default=self._last_served)
