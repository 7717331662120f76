"""Models of the Hugging Face hub: downloading, and what its cache on this host holds."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

import httpx
import huggingface_hub
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from disagg.base.errors import ConfigurationError

_logger = logging.getLogger(__name__)

_METADATA: Final = ["*.json", "*.jinja"]
_WEIGHTS: Final = ["*.safetensors"]


def download(model: str, check: Callable[[Path], object]) -> Path:
    """Return the folder of a hub model, downloading what the cache lacks.

    The configuration comes first, and ``check`` gets its folder, so that an unsupported model costs no download.

    Raises ConfigurationError when the hub cannot be reached, has no such model, or does not grant access, and what
    ``check`` raises.
    """
    check(_snapshot(model, _METADATA))
    return _snapshot(model, _METADATA + _WEIGHTS)


def cached_models() -> list[tuple[str, Path, int]]:
    """Return (hub id, folder, bytes) of every model in the hub cache that has a ``config.json``, newest last."""
    try:
        cache = huggingface_hub.scan_cache_dir()
    except CacheNotFound:
        return []
    found = []
    for repository in sorted(cache.repos, key=lambda repository: repository.last_modified):
        revisions = sorted(repository.revisions, key=lambda revision: revision.last_modified)
        if repository.repo_type == "model" and revisions and (revisions[-1].snapshot_path / "config.json").is_file():
            found.append((repository.repo_id, Path(revisions[-1].snapshot_path), int(revisions[-1].size_on_disk)))
    return found


def _snapshot(model: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ConfigurationError(
            f"the hub model {model!r} is gated: accept its licence on https://huggingface.co/{model} and run "
            "`hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ConfigurationError(
            f"no such model: {model!r} is neither a file or folder here nor a model of the Hugging Face hub"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        _logger.debug("hub download of %s failed", model, exc_info=True)
        raise ConfigurationError(
            f"{model!r} is no file or folder here, and the Hugging Face hub cannot be reached to look for it "
            f"({type(error).__name__}). Give a local folder or GGUF file, or start without MODEL for the default model"
        ) from error
