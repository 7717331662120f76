"""The file that probes look at."""

from pathlib import Path

import pytest

from disagg.base.errors import ConfigurationError
from disagg.serve.launch.ready_file import ReadyFile


def test_the_file_is_there_while_requests_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "ready"
    path.touch()
    shown = ReadyFile(str(path))
    assert not path.exists(), "one of an earlier life says nothing"
    for takes_requests in (True, True, False, False, True):
        shown.show(takes_requests)
        assert path.exists() is takes_requests


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--ready-file .*: there is no folder .*missing"):
        ReadyFile(str(tmp_path / "missing" / "ready"))


def test_without_a_path_nothing_is_shown() -> None:
    ReadyFile(None).show(True)
