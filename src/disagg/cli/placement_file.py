"""Placements from flags or from a YAML file."""

from pathlib import Path

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.cli.yaml_file import read_yaml

DEFAULT_COUNTS = {Role.PREFILL: 1, Role.DECODE: 1}


def choose_placement(file: Path | None, counts: dict[Role, int | None], *, others_join: bool = False) -> Placement:
    """Return the placement of the file, or of the counts that were given, or one prefill and one decode instance.

    With ``others_join`` it need not serve anything alone.

    Raises ConfigurationError when both are given, or the file is none.
    """
    given = {role: count for role, count in counts.items() if count is not None}
    if file is None:
        chosen = given or DEFAULT_COUNTS
        groups = tuple(InstanceGroup(role=role, count=count) for role, count in chosen.items() if count)
        return Placement(groups=groups, others_join=others_join)
    if given:
        flags = " and ".join(f"--{role.value}" for role in given)
        raise ConfigurationError(f"--placement says how many instances there are: leave out {flags}")
    return read_placement(file)


def read_placement(file: Path) -> Placement:
    """Read a placement. Raises ConfigurationError, naming the place in the file, when it is none."""
    return read_yaml(file, Placement, "placement")
