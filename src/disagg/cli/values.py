"""Kinds of values of flags: what click has, but for values that nobody can mean and words that help."""

import os
from pathlib import Path
from typing import Any, Final

import click

from disagg.base.known_names import known_names

_LARGEST: Final = 1e9
"""Seconds, rates and factors beyond are slips."""
_LARGEST_COUNT: Final = 1 << 53


class Number(click.FloatRange):
    """A number in a range, at most 1e9: click lets ``nan`` and ``inf`` pass."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number = super().convert(value, param, ctx)
        if not abs(number) <= _LARGEST:
            self.fail(f"{_shorten(value)} is no number up to {_LARGEST:g}", param, ctx)
        return number


class Count(click.IntRange):
    """An integer in a range, at most 2 to the 53rd."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the integer."""
        number = super().convert(value, param, ctx)
        if not abs(number) <= _LARGEST_COUNT:
            self.fail(f"{_shorten(value)} is no number up to {_LARGEST_COUNT}", param, ctx)
        return number


class Name(click.Choice[str]):
    """One of some names; another is answered with those there are and the closest."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return what is said of an unknown name."""
        return f"{_shorten(value)} is unknown; {known_names(str(value), self.choices)}"


class OutputPath(click.ParamType[Path]):
    """A file, or a folder, to be written at the end: whether it can be is found out at the beginning."""

    name = "path"

    def __init__(self, what: str, *, is_folder: bool = False, makes_folder: bool = False) -> None:
        """``what`` is written, for words: ``the report``; with ``makes_folder`` in a folder that is made for it."""
        self._what = what
        self._is_folder = is_folder
        self._makes_folder = is_folder or makes_folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path."""
        path = Path(value)
        if fault := self._fault(path.absolute()):
            self.fail(f"cannot write {self._what} {path}: {fault}", param, ctx)
        return path

    def _fault(self, path: Path) -> str:
        if path.exists():
            if path.is_dir() != self._is_folder:
                return "it is a folder" if path.is_dir() else "it is no folder"
            place = path
        else:
            place = path.parent
            while self._makes_folder and not place.exists():
                place = place.parent
            if not place.is_dir():
                return f"there is no folder {place}"
        return "" if os.access(place, os.W_OK) else f"{place} is not writable"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class CommandGroup(click.Group):
    """A group that names its commands when it is asked for another."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the arguments begin with. Raises UsageError when there is none of that name."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            known = known_names(error.command_name, self.list_commands(ctx))
            raise click.UsageError(f"No such command {error.command_name!r}; {known}", ctx) from error
