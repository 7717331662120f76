"""Whether two hosts have the same model, told from little of it."""

import hashlib
from typing import Final

import msgspec

from disagg.models.locate import ModelFiles, load_config

_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def fingerprint(files: ModelFiles) -> str:
    """Return a digest of a model's configuration, and of the sizes and samples of its weight files.

    64 samples of each file, so that 100 GB take no longer than 100 MB. Models that differ in training differ in all of
    them; a file of which few bytes were changed on purpose may go unnoticed.
    """
    digest = hashlib.sha256(msgspec.msgpack.encode(load_config(files)))
    for path in files.weight_files():
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for number in range(_NUM_SAMPLES):
                file.seek(size * number // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]
