"""Where KV blocks are kept on disk, as whoever starts a server says it."""

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.units import parse_bytes


class DiskSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where KV blocks are kept on disk, and how many bytes of them at most."""

    folder: str
    max_bytes: int

    @classmethod
    def parse(cls, text: str) -> "DiskSettings":
        """Return what PATH,SIZE says. Raises ConfigurationError when it says neither."""
        folder, comma, size = text.rpartition(",")
        if not comma or not folder.strip():
            raise ConfigurationError(f"--kv-disk {text!r} is not PATH,SIZE, such as /var/cache/disagg,20GiB")
        return cls(folder=folder.strip(), max_bytes=parse_bytes(size))
