"""Those who share a server: what each may have, and the keys by which they are known."""

from typing import Annotated

import msgspec
from msgspec import Meta


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of those who share a server: its part where all want more than there is, and how much it may have at once."""

    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_requests: Annotated[int, Meta(ge=1)] | None = None
    """Sequences under way or waiting; more are refused with 429."""


def is_api_key(key: str) -> bool:
    """Return whether a client can send a text as its key."""
    return bool(key) and key.isprintable() and key == key.strip()
