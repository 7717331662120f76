"""Typed access to the entries of a model's JSON files; every error names the file, the entry and its value."""

import math
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

from disagg.base.errors import ConfigurationError

T = TypeVar("T", int, float, bool, str)


_MOST: Final = 1 << 1000
"""Integers beyond it are no numbers that a float can hold."""


class JsonFields:
    """A parsed JSON object. ``null`` and absence mean the same, but for ``stated``."""

    def __init__(self, entries: Mapping[str, object], source: str) -> None:
        self._entries = entries
        self.source = source

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def has(self, name: str) -> bool:
        """Return whether the entry is there and not null."""
        return self._entries.get(name) is not None

    def stated(self, name: str) -> bool:
        """Return whether the entry is there, be it null."""
        return name in self._entries

    def raw(self, name: str) -> object:
        """Return the entry as parsed, None where it is absent."""
        return self._entries.get(name)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """Return the entry as ``kind``; ``null`` and absence give the default, or an error where there is none."""
        value = self._entries.get(name)
        if value is None:
            if default is None:
                raise ConfigurationError(f"{self.source} has no {name!r}: is it a causal language model's?")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < _MOST else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ConfigurationError(f"{self.source}: {name!r} should be {kind.__name__}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"{self.source}: {name!r} should be a finite number, got {value!r}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """Return a number above 0, or raise naming it."""
        value = self.get(name, float, default)
        if value <= 0:
            raise ConfigurationError(f"{self.source}: {name!r} should be above 0, got {value!r}")
        return value

    def positives(self, name: str) -> tuple[float, ...]:
        """Return a list of numbers above 0, or raise naming it."""
        values = self._entries.get(name)
        if not isinstance(values, list) or not values:
            raise ConfigurationError(f"{self.source}: {name!r} should be a list of numbers, got {values!r}")
        numbered = JsonFields({f"{name}[{index}]": value for index, value in enumerate(values)}, self.source)
        return tuple(numbered.positive(entry) for entry in numbered)

    def section(self, name: str) -> "JsonFields":
        """Return a nested object, empty where it is absent."""
        value = self._entries.get(name)
        if value is None:
            return JsonFields({}, f"{self.source}, {name!r}")
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{self.source}: {name!r} should be an object, got {value!r}")
        return JsonFields(value, f"{self.source}, {name!r}")

    def token_ids(self, name: str) -> tuple[int, ...]:
        """Return an entry that is one token id or a list of them."""
        value = self._entries.get(name)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise ConfigurationError(f"{self.source}: {name!r} should be a token id or a list of them, got {value!r}")
        return ids
