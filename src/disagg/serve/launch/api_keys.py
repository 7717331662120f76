"""The keys that clients may show: one of the command line, any number in a file."""

from pathlib import Path

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.base.tenants import is_api_key


def read_api_keys(settings: ServeSettings) -> tuple[str, ...]:
    """Return all keys; none means that everybody is served.

    A file has a key on each line; blank lines and those that begin with # are passed over. Raises ConfigurationError,
    which shows no key, for a file that cannot be read or has none.
    """
    own = () if settings.api_key is None else (settings.api_key,)
    if settings.api_key_file is None:
        return own
    path = Path(settings.api_key_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"--api-key-file: cannot read {path}: {error}") from error
    keys: dict[str, int] = dict.fromkeys(own, 0)
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not is_api_key(key):
            raise ConfigurationError(f"--api-key-file: line {number} of {path} has control characters")
        if key in keys:
            where = f"line {keys[key]}" if keys[key] else "--api-key"
            raise ConfigurationError(f"--api-key-file: line {number} of {path} has the key of {where} again")
        keys[key] = number
    if len(keys) == len(own):
        raise ConfigurationError(f"--api-key-file: {path} has no key: write one on each line")
    return tuple(keys)
