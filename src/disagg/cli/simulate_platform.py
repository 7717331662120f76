"""From the flags ``--latency``, ``--model`` and ``--engine`` to a platform and an engine's rules."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disagg.base.config import CacheSettings, RouterSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.models.config import ModelConfig
from disagg.simulator.devices import DEVICES, find_device
from disagg.simulator.engines import IMITATED, VLLM_PREFILL_FACTOR, EngineRules, own_rules
from disagg.simulator.platform import Platform

PUBLISHED: Final = "published"


@dataclass(frozen=True)
class ChosenPlatform:
    """A platform, and what is known of its error against its own source."""

    platform: Platform
    errors: dict[str, str]


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


def _published(model: str | None, engine: str) -> ChosenPlatform:
    from disagg.simulator.published import PUBLISHED_MODELS, PublishedPlatform

    if engine not in IMITATED:
        raise ConfigurationError(
            f"published latencies are those of other engines: give --engine {' or '.join(IMITATED)}"
        )
    if model is None:
        raise ConfigurationError(f"give --model: {' or '.join(PUBLISHED_MODELS)}")
    name = model if "/" in model else f"facebook/{model}"
    factor = VLLM_PREFILL_FACTOR if engine == "vllm-0.2.3" else None
    return ChosenPlatform(PublishedPlatform(engine, name, prefill_factor=factor), {})


def _roofline(device: str, model: str | None) -> ChosenPlatform:
    from disagg.simulator.roofline import RooflinePlatform

    config, name = _model_config(model, device)
    return ChosenPlatform(RooflinePlatform(config, find_device(device), name), {})


def _tables(path: Path, model: str | None) -> ChosenPlatform:
    from disagg.simulator.tables import OperatorTables, TablePlatform

    config, name = _model_config(model, path.name)
    tables = OperatorTables.read(path.parent, path.name, find_device(path.name.replace("_", "-")))
    errors = {f"{operator}, from its neighbours": str(error) for operator, error in tables.errors().items()}
    return ChosenPlatform(TablePlatform(tables, config, name), errors)


def _profiled(path: Path, kv_memory_bytes: int) -> ChosenPlatform:
    from disagg.simulator.profile import ProfiledPlatform, load_profile

    platform = ProfiledPlatform(load_profile(path), kv_memory_bytes)
    errors = {f"tensor parallelism {tensor}, held out": str(error) for tensor, error in platform.errors.items()}
    return ChosenPlatform(platform, errors)


def _model_config(model: str | None, latency: str) -> tuple[ModelConfig, str]:
    from disagg.models.hf_config import config_from_hf
    from disagg.models.locate import load_config, locate_model, read_json
    from disagg.simulator.published import PUBLISHED_MODELS

    if model is not None and model.endswith(".json"):
        path = Path(model)
        return config_from_hf(read_json(path), source=str(path)), path.resolve().parent.name
    published = {name.removeprefix("facebook/"): name for name in PUBLISHED_MODELS}
    if model in (*published, *published.values()) and not Path(model).exists():
        raise ConfigurationError(
            f"--model {model} has step times of its own, with --engine {' or '.join(IMITATED)} and without --latency; "
            f"beside {latency} name a model that disagg runs: its config.json, folder, GGUF file or hub id"
        )
    files = locate_model(model)
    return load_config(files), files.name
