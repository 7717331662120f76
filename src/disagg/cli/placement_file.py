"""Placements from flags, and from and to YAML files."""

from pathlib import Path

import msgspec
import yaml

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


def write_placement(placement: Placement, file: Path) -> None:
    """Write what ``read_placement`` reads, without what is as usual. Raises ConfigurationError when it cannot."""
    groups = []
    for group in placement.groups:
        usual = msgspec.to_builtins(InstanceGroup(role=group.role, count=1))
        said = msgspec.to_builtins(group)
        groups.append(
            {name: value for name, value in said.items() if name in ("role", "count") or value != usual[name]}
        )
    try:
        file.write_text(yaml.safe_dump({"groups": groups}, sort_keys=False, default_flow_style=None), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write the placement {file}: {error.strerror}") from error
