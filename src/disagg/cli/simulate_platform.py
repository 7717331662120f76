"""From the flags ``--latency``, ``--model`` and ``--engine`` to a platform and an engine's rules."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Final

from msgspec import structs

from disagg.base.config import CacheSettings, InstanceGroup, Placement, RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.base.request import Role
from disagg.cli.cluster_source import read_cluster
from disagg.costs.cluster_file import PROFILED
from disagg.costs.devices import DEVICES, find_device
from disagg.costs.platform import Platform
from disagg.costs.profile import Profile
from disagg.costs.topology import Topology
from disagg.models.shape import ModelShape
from disagg.scheduling.host_cores import are_lent, assign_cores
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
    profile: Profile | None = None
    """Where step times come from, if from one."""

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


def with_threads(placement: Placement, on: ChosenPlatform, threads: int | None) -> Placement:
    """Return a placement that says of each instance on how many threads it computes, as ``disagg serve`` starts it.

    ``threads`` are those of all instances, if given. Else they share the profile's cores, but for those that say their
    own. On a cluster, and where no instance computes on cores, the placement stays as it is.
    """
    if threads is not None:
        return structs.replace(placement, groups=tuple(_on(group, threads) for group in placement.groups))
    profile = on.profile
    if profile is None or profile.num_cores is None or not profile.threads or on.topology is not None:
        return placement
    roles = list(Role)
    ones = [
        structs.replace(group, count=1)
        for group in sorted(placement.groups, key=lambda group: roles.index(group.role))
        for _ in range(group.count)
    ]
    cores = assign_cores(range(profile.num_cores), [one.num_threads for one in ones])
    told = [_on(one, one.num_threads or len(own)) for one, own in zip(ones, cores, strict=True)]
    alike = [tuple(same) for _, same in groupby(told)]
    return structs.replace(placement, groups=tuple(structs.replace(same[0], count=len(same)) for same in alike))


def lent_cores(placement: Placement, on: ChosenPlatform, asked: bool | None, threads: int | None) -> int | None:
    """Return how many cores the host has whose instances lend each other theirs; None where they do not.

    By the same rule as ``disagg serve``: ``asked`` and ``threads`` are flags, and the placement is the one that was
    given. Raises ConfigurationError where lending is asked for and there is no such host.
    """
    num_cores = None if on.profile is None or on.topology is not None else on.profile.num_cores
    if num_cores is None and asked:
        raise ConfigurationError(
            "--lend-cores: only instances on the cores of one host lend them; give their profile as --latency, and no "
            "--cluster"
        )
    wanted = [threads or group.num_threads for group in placement.groups]
    return num_cores if are_lent(asked, placement.lend_cores, wanted) else None


def _on(group: InstanceGroup, num_threads: int) -> InstanceGroup:
    return structs.replace(group, num_threads=num_threads)


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
    from disagg.costs.measured_steps import fit_latency
    from disagg.costs.profile import load_profile
    from disagg.costs.profiled_platform import ProfiledPlatform

    profile = load_profile(path)
    platform = ProfiledPlatform(profile, kv_memory_bytes)
    errors = {f"{steps.words}, held out": str(fit_latency(steps.samples)[1]) for steps in profile.steps}
    return ChosenPlatform(platform, errors, PROFILED, profile=profile)


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
