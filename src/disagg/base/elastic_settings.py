"""How a deployment may change by itself: how many instances of each role, and whether it is planned anew."""

import enum
import re
from collections.abc import Mapping
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.base.request import Role

_PART: Final = re.compile(r"\s*(\w+)\s*=\s*(\d+)\.\.(\d+)\s*")
_MOST: Final = 4096
_SHAPE: Final = "write ROLE=FEWEST..MOST, such as prefill=1..3,decode=1..3"


class Replan(enum.Enum):
    """What becomes of the placement when the workload has moved.

    ``ADVISE``: a better one is looked for, and told. ``ACT``: it is changed to as well.
    """

    OFF = "off"
    ADVISE = "advise"
    ACT = "act"


class InstanceRange(msgspec.Struct, frozen=True, array_like=True):
    """How many instances of a role there may be."""

    fewest: int
    most: int


def parse_autoscale(text: str | None) -> Mapping[Role, InstanceRange]:
    """Read ``prefill=1..3,decode=1..3``; None is no role at all. Raises ConfigurationError when it says neither."""
    ranges: dict[Role, InstanceRange] = {}
    for part in [] if text is None else text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise ConfigurationError(f"--autoscale {text!r}: {part.strip()!r} is no range of a role: {_SHAPE}")
        names = [role.value for role in Role]
        if match[1] not in names:
            raise ConfigurationError(
                f"--autoscale {text!r}: no role is called {match[1]!r}; {known_names(match[1], names)}"
            )
        role, fewest, most = Role(match[1]), int(match[2]), int(match[3])
        if role in ranges:
            raise ConfigurationError(f"--autoscale {text!r} gives {role.value} twice: give each role once")
        if not 1 <= fewest <= most <= _MOST:
            raise ConfigurationError(
                f"--autoscale {text!r}: {fewest}..{most} {role.value} instances cannot be: at least 1, at most "
                f"{_MOST}, the lower number first"
            )
        ranges[role] = InstanceRange(fewest, most)
    return ranges
