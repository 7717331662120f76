"""Structs from YAML files, with errors that say the file, the place in it, and what may stand there."""

from pathlib import Path
from typing import TypeVar

import msgspec
import yaml

from disagg.base.errors import ConfigurationError
from disagg.base.structs import read_struct

S = TypeVar("S", bound=msgspec.Struct)


def read_yaml(file: Path, kind: type[S], what: str) -> S:
    """Read a ``what``, such as a placement. Raises ConfigurationError when the file cannot be read or holds none."""
    try:
        return read_struct(yaml.safe_load(file.read_text(encoding="utf-8-sig")), kind)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the {what} {file}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, ConfigurationError) as error:
        raise ConfigurationError(f"{file} is not a {what}: {error}") from error
