"""What ``disagg models`` shows: the models that can be loaded from this host right now."""

from pathlib import Path

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.model_code import ModelCode
from disagg.models.config import ModelConfig
from disagg.models.foreign import ForeignModel
from disagg.models.gguf_file import GgufFile
from disagg.models.locate import DEFAULT_MODEL_NAME, ModelFiles, ModelKind, load_served_model_config, locate_model


class ModelListing(msgspec.Struct, frozen=True, kw_only=True):
    """One model. ``problem`` says why it cannot be served, where it cannot."""

    name: str
    kind: ModelKind
    path: Path | None = None
    num_bytes: int = 0
    architecture: str | None = None
    num_parameters: int | None = None
    max_position_embeddings: int | None = None
    kv_bytes: int | None = None
    """Of the KV blocks of one sequence that is as long as it can be, in 16 bits an element."""
    problem: str | None = None


def describe_model(model: str) -> ModelListing:
    """Return what MODEL, as ``locate_model`` takes it, is: with the problem, where it is none that can be loaded."""
    try:
        files = locate_model(model)
    except ConfigurationError as error:
        return ModelListing(name=model, kind=ModelKind.HF_FOLDER, problem=str(error))
    paths = files.path.rglob("*") if files.path.is_dir() else (files.path,)
    return _describe(files, sum(path.stat().st_size for path in paths if path.is_file()))


def list_models() -> list[ModelListing]:
    """Return the default model first, then what the hub's cache holds."""
    from disagg.models.hub import cached_models

    listings = [_default_model()]
    for name, path, num_bytes in cached_models():
        listings.append(_describe(ModelFiles(name=name, kind=ModelKind.HF_FOLDER, path=path), num_bytes))
    return listings


def _default_model() -> ModelListing:
    try:
        files = locate_model(None)
    except ConfigurationError as error:
        return ModelListing(name=DEFAULT_MODEL_NAME, kind=ModelKind.GGUF, problem=str(error))
    return _describe(files, files.path.stat().st_size)


def _describe(files: ModelFiles, num_bytes: int) -> ModelListing:
    config: ModelConfig | ForeignModel | None = None
    problem = None
    try:
        config = load_served_model_config(files, ModelCode.AUTO)
        files.weight_files()
        if files.kind is ModelKind.GGUF:
            with GgufFile(files.path) as file:
                file.check_formats()
    except ConfigurationError as error:
        problem = str(error)
    return ModelListing(
        name=files.name,
        kind=files.kind,
        path=files.path,
        num_bytes=num_bytes,
        architecture=config.class_name if config else None,
        # Sizes of the KV cache alone are known of a model that transformers computes.
        num_parameters=config.num_parameters if isinstance(config, ModelConfig) else None,
        max_position_embeddings=config.max_position_embeddings if config else None,
        kv_bytes=config.kv_bytes(config.max_position_embeddings, 2) if config else None,
        problem=problem,
    )
