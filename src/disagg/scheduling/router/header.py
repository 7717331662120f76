"""Everything that the core of the router is made from: the head of its log."""

import enum

import msgspec

from disagg.base.config import RouterSettings, SchedulerSettings
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.router.restart import RestartSettings


class RouterPart(enum.Enum):
    """What a router is among those of a server."""

    ALONE = "alone"
    KEEPER = "keeper"
    """It has no sequences. It decides how the deployment changes, by what the others report."""
    FOLLOWER = "follower"
    """It reports, and follows what is decided."""


class RouterHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True, tag=True):
    """Everything that the core of the router is made from, at ``started_s``.

    ``watches_silence`` treats instances without a sign of life as dead: where they give signs. ``measures_links`` asks
    instances how fast they read each other's KV blocks: where they can tell.
    """

    instances: dict[InstanceId, Role]
    settings: RouterSettings
    scheduler: SchedulerSettings = SchedulerSettings()
    """What the instances are told in common."""
    started_s: float = 0.0
    restarts: RestartSettings = RestartSettings()
    watches_silence: bool = True
    measures_links: bool = False
    cordoned: tuple[InstanceId, ...] = ()
    """Instances that were drained before this core began."""
    part: RouterPart = RouterPart.ALONE
