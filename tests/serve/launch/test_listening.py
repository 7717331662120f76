"""Sockets and endpoints."""

import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError
from disagg.serve.launch.listening import listen, private_endpoint, url_of


def test_a_listening_socket_takes_connections_before_anybody_accepts_them():
    with listen(ServeSettings(port=0)) as bound:
        host, port = bound.getsockname()
        assert url_of(bound) == f"http://127.0.0.1:{port}"
        socket.create_connection((host, port), timeout=5.0).close()


def test_a_busy_port_is_said_with_the_remedy():
    with listen(ServeSettings(port=0)) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"port {port} on 127\.0\.0\.1 is in use.*--port"):
            listen(ServeSettings(port=port))


def test_an_address_of_somebody_else_is_refused():
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        listen(ServeSettings(host="192.0.2.1", port=0))


def test_a_name_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="--host 'no such host'"):
        listen(ServeSettings(host="no such host", port=0))


def test_the_url_of_all_addresses_can_be_opened():
    with listen(ServeSettings(host="0.0.0.0", port=0)) as bound:
        assert url_of(bound).startswith("http://127.0.0.1:")


def test_the_private_endpoint_is_private_and_goes_away():
    with private_endpoint() as endpoint:
        folder = Path(endpoint.removeprefix("ipc://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
    assert not folder.exists()


def test_what_a_killed_server_left_behind_is_removed_and_nothing_else(tmp_path_factory, monkeypatch):
    parent = tmp_path_factory.mktemp("t")
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    orphan, stranger = parent / "disagg-orphan", parent / "disagg-notes"
    for folder in (orphan, stranger):
        folder.mkdir()
    (orphan / "lock").touch()
    with private_endpoint() as endpoint, private_endpoint():
        assert Path(endpoint.removeprefix("ipc://")).parent.exists(), "its server lives"
        assert not orphan.exists()
    assert list(parent.iterdir()) == [stranger]


def test_a_path_that_no_socket_can_have_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ConfigurationError, match="TMPDIR"), private_endpoint():
        pass
    assert not list(long.iterdir())


@pytest.mark.parametrize(
    ("host", "shown"), [("::1", "http://[::1]:"), ("[::1]", "http://[::1]:"), ("::", "http://[::1]:")]
)
def test_ipv6_has_brackets_in_its_url(host: str, shown: str) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        bound = listen(ServeSettings(host=host, port=0))
    except ConfigurationError as error:
        pytest.skip(str(error))
    with bound:
        assert url_of(bound).startswith(shown)
        with socket.create_connection(("::1", bound.getsockname()[1]), timeout=5.0) as client:
            assert client.family == socket.AF_INET6
