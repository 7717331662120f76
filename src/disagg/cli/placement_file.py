"""Placements from flags, and from and to YAML files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec
import yaml
from click.core import ParameterSource
from msgspec import structs

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import ServiceClass, ServiceClassEntry
from disagg.base.transfer_settings import TransferSettings
from disagg.cli.flags import build
from disagg.cli.yaml_file import read_yaml
from disagg.measure.slo import parse_slo

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
    placement = read_yaml(file, Placement, "placement")
    try:
        classes_of(placement)
    except ConfigurationError as error:
        raise ConfigurationError(f"{file} is not a placement: {error}") from error
    return placement


def classes_of(placement: Placement) -> dict[str, ServiceClass]:
    """Return the classes of service by name. Raises ConfigurationError for objectives that are none."""
    return {name: _service_class(name, entry) for name, entry in placement.classes.items()}


def _service_class(name: str, entry: ServiceClassEntry) -> ServiceClass:
    try:
        objectives = parse_slo(entry.slo).objectives() if entry.slo else Objectives()
    except ConfigurationError as error:
        raise ConfigurationError(f"slo of the class {name}: {error}") from error
    return ServiceClass(objectives=objectives, priority=entry.priority, overload=entry.overload)


def choose_transfer(values: Mapping[str, Any], placement: Placement) -> TransferSettings:
    """Return how KV blocks travel: what flags leave open, as the placement says."""
    source = click.get_current_context().get_parameter_source("kv_transfer_dtype")
    settings = build(TransferSettings, values)
    if placement.kv_transfer_dtype is None or source is not ParameterSource.DEFAULT:
        return settings
    return structs.replace(settings, kv_transfer_dtype=placement.kv_transfer_dtype)


def write_placement(placement: Placement, file: Path) -> None:
    """Write what ``read_placement`` reads, without what is as usual. Raises ConfigurationError when it cannot."""
    groups = []
    for group in placement.groups:
        usual = msgspec.to_builtins(InstanceGroup(role=group.role, count=1))
        said = msgspec.to_builtins(group)
        groups.append(
            {name: value for name, value in said.items() if name in ("role", "count") or value != usual[name]}
        )
    whole: dict[str, object] = {"groups": groups}
    if placement.kv_transfer_dtype is not None:
        whole["kv_transfer_dtype"] = placement.kv_transfer_dtype.value
    if placement.lend_cores is not None:
        whole["lend_cores"] = placement.lend_cores
    if placement.classes:
        whole["classes"] = msgspec.to_builtins(placement.classes)
    try:
        file.write_text(yaml.safe_dump(whole, sort_keys=False, default_flow_style=None), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write the placement {file}: {error.strerror}") from error
