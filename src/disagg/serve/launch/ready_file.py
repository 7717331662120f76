"""A file that is there while an instance takes requests: what a probe that runs a command can look at."""

from contextlib import suppress
from pathlib import Path

from disagg.base.errors import ConfigurationError


class ReadyFile:
    """``path`` None shows nothing. Raises ConfigurationError where no file can be."""

    def __init__(self, path: str | None) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None and not self._path.parent.is_dir():
            raise ConfigurationError(f"--ready-file {path}: there is no folder {self._path.parent}; make it first")
        self.show(False)

    def show(self, takes_requests: bool) -> None:
        """Make the file, or remove it."""
        if self._path is None:
            return
        try:
            if takes_requests:
                self._path.touch()
            else:
                with suppress(FileNotFoundError):
                    self._path.unlink()
        except OSError as error:
            raise ConfigurationError(f"--ready-file {self._path} cannot be made: {error.strerror}") from error
