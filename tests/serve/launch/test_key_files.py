"""The keys of a deployment's hosts: made once, private, and complete on every host that needs them."""

import shutil
import stat
from pathlib import Path

import pytest

from disagg.base.errors import ConfigurationError
from disagg.serve.launch.key_files import instance_keys, make_keys, server_guard
from disagg.serve.launch.server_address import parse_host_port


def test_keys_are_made_once_and_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    assert make_keys(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"server.key", "server.key_secret", "instance.key", "instance.key_secret"}
    assert not make_keys(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for path in (folder, *folder.iterdir()):
        assert not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), path


def test_the_server_admits_whoever_has_the_copied_files(tmp_path: Path) -> None:
    make_keys(tmp_path / "server")
    (tmp_path / "other").mkdir()
    for name in ("server.key", "instance.key_secret"):
        shutil.copy(tmp_path / "server" / name, tmp_path / "other")
    keys, guard = instance_keys(tmp_path / "other"), server_guard(tmp_path / "server")
    assert keys.public.encode() in guard.admitted
    with pytest.raises(ConfigurationError, match=r"server\.key_secret"):
        server_guard(tmp_path / "other")


def test_missing_and_broken_keys_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="disagg keys"):
        instance_keys(tmp_path)
    make_keys(tmp_path)
    (tmp_path / "instance.key_secret").write_text("not a key")
    with pytest.raises(ConfigurationError, match="disagg keys"):
        instance_keys(tmp_path)
    shutil.copy(tmp_path / "instance.key", tmp_path / "instance.key_secret")
    with pytest.raises(ConfigurationError, match="has no secret key"):
        instance_keys(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be made there"):
        make_keys(tmp_path / "file" / "keys")


@pytest.mark.parametrize(
    ("value", "parts"),
    [("10.0.0.1:7000", ("10.0.0.1", 7000)), ("[::1]:0", ("::1", 0)), ("node-3.local:65535", ("node-3.local", 65535))],
)
def test_addresses_are_taken_apart(value: str, parts: tuple[str, int]) -> None:
    assert parse_host_port(value, "--join") == parts


@pytest.mark.parametrize("value", ["10.0.0.1", ":7000", "10.0.0.1:", "10.0.0.1:65536", "10.0.0.1:-1", "10.0.0.1:x"])
def test_what_is_no_address_is_refused_by_the_name_of_its_flag(value: str) -> None:
    with pytest.raises(ConfigurationError, match="--join"):
        parse_host_port(value, "--join")
