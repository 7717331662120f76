"""Classes of service: what requests that name one are promised, and what becomes of those that would come too late."""

import enum
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.objectives import Objectives

ClassName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
MAX_CLASSES: Final = 64
"""Each is a label value of metrics."""


class Overload(enum.Enum):
    """What becomes of a request that is predicted to miss its objectives.

    ``QUEUE``: it waits. ``BEST_EFFORT``: it is served after those that can keep theirs, and at the latest
    ``MAX_OVERTAKE_S`` late. ``SHED``: it is refused, with the time after which to try again.
    """

    QUEUE = "queue"
    BEST_EFFORT = "best-effort"
    SHED = "shed"


class ServiceClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the requests of a class have that say nothing else. ``overload`` None: as the server says for all."""

    objectives: Objectives = Objectives()
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    """Lower is served earlier."""
    overload: Overload | None = None


class ServiceClassEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A class as a placement file has it. ``slo`` is written as for ``--slo``."""

    slo: Annotated[str, Meta(max_length=256)] = ""
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] = 0
    overload: Overload | None = None
