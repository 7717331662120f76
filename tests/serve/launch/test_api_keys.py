"""Keys from the command line and from a file; refusals show no key."""

from pathlib import Path

import pytest

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.serve.launch.api_keys import read_api_keys


def test_keys_of_both_places_count(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\n  beta \n")
    assert read_api_keys(ServeSettings()) == ()
    assert read_api_keys(ServeSettings(api_key="own")) == ("own",)
    assert read_api_keys(ServeSettings(api_key="own", api_key_file=str(file))) == ("own", "alpha", "beta")
    assert read_api_keys(ServeSettings(api_key_file=str(file))) == ("alpha", "beta")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("# nothing\n", "has no key"),
        ("secret\n\nsecret\n", "line 3 of .* has the key of line 1 again"),
        ("own\n", "line 1 of .* has the key of --api-key again"),
        ("se\x07cret\n", "line 1 of .* has control characters"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        read_api_keys(ServeSettings(api_key="own", api_key_file=str(file)))
    assert "secret" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--api-key-file: cannot read .*missing"):
        read_api_keys(ServeSettings(api_key_file=str(tmp_path / "missing")))
