"""From the flags ``--latency``, ``--model`` and ``--engine`` to a platform and an engine's rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from disagg.base.config import CacheSettings, RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.cli.cluster_source import read_cluster
from disagg.costs.cluster_file import PROFILED
from disagg.costs.devices import DEVICES, find_device
from disagg.costs.platform import Platform
from disagg.costs.topology import Topology
from disagg.models.shape import ModelShape
from disagg.simulator.engines import IMITATED, EngineRules, own_rules

PUBLISHED: Final = "published"


@dataclass(frozen=True)
class ChosenPlatform:
    """A platform, and what is known of its error against its own source.

    ``device`` is the kind that it was measured or computed for, as cluster files call it. On the nodes of
    ``topology``, ``by_kind`` names the platforms of kinds of devices.
    """

    platform: Platform
    errors: dict[str, str]
    device: str
    topology: Topology | None = None
    by_kind: Mapping[str, Platform] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Model, devices and where the figures come from, for people."""
        return "; ".join(platform.name for platform in self.by_kind.values()) or self.platform.name


def choose_rules(
    engine: str, scheduler: SchedulerSettings, cache: CacheSettings, router: RouterSettings
) -> EngineRules:
    """Return the rules of an imitated engine, or of our own with these settings."""
    return IMITATED[engine] if engine in IMITATED else own_rules(scheduler, cache, router)


def choose_platform(latency: str | None, model: str | None, engine: str, kv_memory_bytes: int) -> ChosenPlatform:
    """Return the platform that ``--latency`` names. Raises ConfigurationError when there is none."""
    if latency is None:
        if engine not in IMITATED:
            raise ConfigurationError(
                "where do step times come from? Give --latency: a profile that disagg profile wrote (FILE.json), a "
                f"device ({', '.join(DEVICES)}), or operator tables (FOLDER/a100_sxm); or --engine "
                f"{' or '.join(IMITATED)}, which have published ones"
            )
        latency = PUBLISHED
    if latency == PUBLISHED:
        return _published(model, engine)
    if latency in DEVICES:
        return _roofline(latency, model)
    path = Path(latency)
    if path.suffix == ".json":
        return _profiled(path, kv_memory_bytes)
    if path.parent.is_dir() and any(path.parent.glob(f"{path.name}.*.csv")):
        return _tables(path, model)
    raise ConfigurationError(
        f"--latency {latency}: no profile (.json), no operator tables ({latency}.*.csv), and no device of that name; "
        f"{known_names(latency, [*DEVICES, PUBLISHED])}"
    )


def choose_cluster(
    source: str, latency: str | None, model: str | None, engine: str, kv_memory_bytes: int
) -> ChosenPlatform:
    """Return what ``choose_platform`` does, on the nodes of a cluster (see ``read_cluster``).

    Without ``--latency``, each kind of device takes the roofline of its data sheet. Raises ConfigurationError where the
    step times are those of another kind.
    """
    cluster = read_cluster(source, latency)
    if latency is None and PROFILED in cluster.kinds:
        raise ConfigurationError(f"{source} has {PROFILED} devices: give their profile as --latency")
    if latency is None and engine not in IMITATED:
        by_kind = {kind: _roofline(kind, model).platform for kind in cluster.kinds}
        return replace(_roofline(cluster.kinds[0], model), topology=cluster.topology(), by_kind=by_kind)
    chosen = choose_platform(latency, model, engine, kv_memory_bytes)
    others = [kind for kind in cluster.kinds if kind != chosen.device]
    if others:
        raise ConfigurationError(
            f"{chosen.name} says nothing of {', '.join(others)} in {source}: write device: {chosen.device}, or leave "
            "out --latency for the rooflines of the devices"
        )
    return replace(chosen, topology=cluster.topology(chosen.platform.link))


def _published(model: str | None, engine: str) -> ChosenPlatform:
    from disagg.costs.published import PUBLISHED_MODELS, PublishedPlatform

    if engine not in IMITATED:
        raise ConfigurationError(
            f"published latencies are those of other engines: give --engine {' or '.join(IMITATED)}"
        )
    if model is None:
        raise ConfigurationError(f"give --model: {' or '.join(PUBLISHED_MODELS)}")
    name = model if "/" in model else f"facebook/{model}"
    return ChosenPlatform(PublishedPlatform(engine, name), {}, "a100-sxm")


def _roofline(device: str, model: str | None) -> ChosenPlatform:
    from disagg.costs.roofline import RooflinePlatform

    shape, name = _model_shape(model)
    return ChosenPlatform(RooflinePlatform(shape, find_device(device), name), {}, device)


def _tables(path: Path, model: str | None) -> ChosenPlatform:
    from disagg.costs.tables import OperatorTables, TablePlatform

    shape, name = _model_shape(model)
    tables = OperatorTables.read(path.parent, path.name, find_device(path.name.replace("_", "-")))
    errors = {f"{operator}, from its neighbours": str(error) for operator, error in tables.errors().items()}
    return ChosenPlatform(TablePlatform.on(tables, shape, name), errors, tables.device.name)


def _profiled(path: Path, kv_memory_bytes: int) -> ChosenPlatform:
    from disagg.costs.profile import ProfiledPlatform, load_profile

    platform = ProfiledPlatform(load_profile(path), kv_memory_bytes)
    errors = {f"tensor parallelism {tensor}, held out": str(error) for tensor, error in platform.errors.items()}
    return ChosenPlatform(platform, errors, PROFILED)


def _model_shape(model: str | None) -> tuple[ModelShape, str]:
    """Return the shape of a ``config.json`` or its folder, a known name, or what ``serve`` would load; and its name."""
    from disagg.models.known_shapes import known_shape, shape_from_hf
    from disagg.models.locate import load_config, locate_model, read_json

    path = Path(model or "")
    if model is not None and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json":
        return shape_from_hf(read_json(path), str(path)), path.resolve().parent.name
    if model is not None and not path.exists() and (known := known_shape(model)) is not None:
        return known, model.lower()
    files = locate_model(model)
    return load_config(files), files.name
