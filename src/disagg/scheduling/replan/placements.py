"""The placements that can be reached from the present one by flips and joins, and what leads there. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Final

import msgspec

from disagg.base.elastic_settings import InstanceRange
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.capacity import serves_requests
from disagg.scheduling.dispatch.events import ChangeRole

MOST_CHANGES: Final = 2
"""Flips and joins in sum, of one change of the placement."""


class RoleCounts(msgspec.Struct, frozen=True, array_like=True):
    """How many instances there are of each role."""

    prefill: int = 0
    decode: int = 0
    colocated: int = 0

    @classmethod
    def of(cls, roles: Iterable[Role]) -> "RoleCounts":
        """Count roles."""
        found = list(roles)
        return cls(*(found.count(role) for role in (Role.PREFILL, Role.DECODE, Role.COLOCATED)))

    def by_role(self) -> dict[Role, int]:
        """Return the numbers by role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.COLOCATED: self.colocated}

    @property
    def total(self) -> int:
        """All of them."""
        return self.prefill + self.decode + self.colocated

    def __str__(self) -> str:
        return " + ".join(f"{count} {role.value}" for role, count in self.by_role().items() if count)


def reachable(
    present: RoleCounts, ranges: Mapping[Role, InstanceRange], *, strict_roles: bool
) -> tuple[RoleCounts, ...]:
    """Return the present placement, and then all within ``MOST_CHANGES`` that can serve requests.

    A role with a range stays within it, and instances join only as far as the ranges have room for more of their role.
    """
    most = present.total + sum(
        max(0, ranges[role].most - count) for role, count in present.by_role().items() if role in ranges
    )
    found = [present]
    for counts in product(range(most + 1), repeat=3):
        one = RoleCounts(*counts)
        changes = _num_changes(present, one)
        if one == present or one.total < present.total or one.total > most or changes > MOST_CHANGES:
            continue
        by_role = one.by_role()
        room = sum(max(0, by_role[role] - count) for role, count in present.by_role().items() if role in ranges)
        if room < one.total - present.total:
            continue
        if any(not bounds.fewest <= by_role[role] <= bounds.most for role, bounds in ranges.items()):
            continue
        if serves_requests({role for role, count in by_role.items() if count}, strict_roles=strict_roles):
            found.append(one)
    return tuple(found)


def _num_changes(present: RoleCounts, target: RoleCounts) -> int:
    """Return the flips and joins that lead from one to the other."""
    return sum(max(0, target.by_role()[role] - count) for role, count in present.by_role().items())


def changes_towards(
    target: RoleCounts, instances: Sequence[tuple[InstanceId, Role]]
) -> tuple[list[ChangeRole], list[Role]]:
    """Return the flips, and the roles of the instances that join, that lead to ``target``.

    Of a role with too many, those that come first in ``instances`` are flipped.
    """
    lacking = [
        role
        for role, count in target.by_role().items()
        for _ in range(count - sum(own is role for _, own in instances))
    ]
    surplus = {role: sum(own is role for _, own in instances) - count for role, count in target.by_role().items()}
    flips = []
    for instance, role in instances:
        if surplus[role] > 0 and lacking:
            surplus[role] -= 1
            flips.append(ChangeRole(instance=instance, role=lacking.pop(0)))
    return flips, lacking
