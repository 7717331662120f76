"""Those who share a server: what each may have, and the keys by which they are known."""

from collections.abc import Iterable, Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names


class TenantSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One of those who share a server: its part where all want more than there is, and how much it may have at once."""

    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_requests: Annotated[int, Meta(ge=1)] | None = None
    """Sequences under way or waiting; more are refused with 429."""
    service_class: str | None = None
    """Of its requests that name none."""


def check_classes(tenants: Mapping[str, TenantSettings], classes: Iterable[str]) -> None:
    """Raise ConfigurationError for a tenant whose class of service is none of the ``classes``."""
    for name, tenant in tenants.items():
        if tenant.service_class is not None and tenant.service_class not in classes:
            raise ConfigurationError(
                f"the tenant {name} has the class of service {tenant.service_class!r}, and the placement has no such "
                f"one: {known_names(tenant.service_class, classes)}"
            )


def is_api_key(key: str) -> bool:
    """Return whether a client can send a text as its key."""
    return bool(key) and key.isprintable() and key == key.strip()
