"""A name for the contents of a model's files, for what is kept on disk and holds for that model alone."""

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from disagg.base.model_code import ModelCode
from disagg.models.config import ModelConfig
from disagg.models.locate import ModelFiles, load_served_model_config

_PIECE: Final = 1 << 16
_NUM_PIECES: Final = 64


def fingerprint(files: ModelFiles, code: ModelCode, max_model_len: int | None) -> bytes:
    """Return 32 bytes that differ for other weights or another configuration, ``max_model_len`` where it matters.

    Of each weight file its size and 64 pieces of 64 KiB, evenly spread, are looked at: all of a small file, and of a
    large one enough that no fine-tuning leaves them as they were. Raises OSError when a file cannot be read.
    """
    config = load_served_model_config(files, code)
    digest = hashlib.sha256()
    if isinstance(config, ModelConfig):
        digest.update(msgspec.json.encode(config.for_length(max_model_len).rope_scaling))
    configuration = files.file("config.json")
    if configuration is not None:
        digest.update(configuration.read_bytes())
    for path in files.weight_files():
        digest.update(path.name.encode() + b"\0" + path.stat().st_size.to_bytes(8, "little"))
        _add_pieces(digest, path)
    return digest.digest()


def _add_pieces(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        for number in range(_NUM_PIECES):
            file.seek(max(0, (size - _PIECE) * number // (_NUM_PIECES - 1)))
            digest.update(file.read(_PIECE))
