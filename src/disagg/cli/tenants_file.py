"""Those who share a server, from a YAML file: their keys, weights and bounds."""

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.service_classes import ClassName
from disagg.base.tenants import TenantSettings
from disagg.cli.yaml_file import read_yaml


class TenantEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant. Without a key, requests are its own that name it as ``user``."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    key: str | None = None
    weight: Annotated[float, Meta(gt=0, le=1e6)] = 1.0
    max_requests: Annotated[int, Meta(ge=1)] | None = None
    service_class: ClassName | None = None


class TenantsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All tenants that have something of their own."""

    tenants: tuple[TenantEntry, ...]

    def settings(self) -> dict[str, TenantSettings]:
        """Return what the router is told: no keys."""
        return {
            one.name: TenantSettings(weight=one.weight, max_requests=one.max_requests, service_class=one.service_class)
            for one in self.tenants
        }

    def keys(self) -> dict[str, str]:
        """Return the name of each key's tenant."""
        return {one.key: one.name for one in self.tenants if one.key is not None}


def read_tenants(file: Path | None) -> TenantsFile:
    """Read a file of tenants; without one there are none. Raises ConfigurationError for what is no such file."""
    if file is None:
        return TenantsFile(tenants=())
    found = read_yaml(file, TenantsFile, "list of tenants")
    names = [one.name for one in found.tenants]
    keys = [one.key for one in found.tenants if one.key is not None]
    for what, all_of_them in (("name", names), ("key", keys)):
        if len(set(all_of_them)) < len(all_of_them):
            raise ConfigurationError(f"{file}: two tenants have the same {what}: give each one of its own")
    return found
