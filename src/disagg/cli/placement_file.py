"""Placements from flags or from a YAML file."""

from pathlib import Path

import yaml

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.structs import read_struct

DEFAULT_COUNTS = {Role.PREFILL: 1, Role.DECODE: 1}


def choose_placement(file: Path | None, counts: dict[Role, int | None]) -> Placement:
    """Return the placement of the file, or of the counts that were given, or one prefill and one decode instance.

    Raises ConfigurationError when both are given, or the file is none.
    """
    given = {role: count for role, count in counts.items() if count is not None}
    if file is None:
        chosen = given or DEFAULT_COUNTS
        return Placement(groups=tuple(InstanceGroup(role=role, count=count) for role, count in chosen.items() if count))
    if given:
        flags = " and ".join(f"--{role.value}" for role in given)
        raise ConfigurationError(f"--placement says how many instances there are: leave out {flags}")
    return read_placement(file)


def read_placement(file: Path) -> Placement:
    """Read a placement. Raises ConfigurationError, naming the place in the file, when it is none."""
    try:
        return read_struct(yaml.safe_load(file.read_text(encoding="utf-8-sig")), Placement)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the placement {file}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, ConfigurationError) as error:
        raise ConfigurationError(f"{file} is not a placement: {error}") from error
