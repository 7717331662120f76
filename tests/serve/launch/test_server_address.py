"""A server's name is looked up at each attempt; what the resolver does not know is said, and may be tried again."""

import socket

import pytest

from disagg.base.errors import UnavailableError
from disagg.serve.launch.server_address import ServerAddress, ServerName


async def test_a_name_becomes_an_address_and_this_hosts_own_towards_it() -> None:
    assert await ServerName("localhost", 7000).look_up() == ServerAddress("tcp://127.0.0.1:7000", "127.0.0.1")


async def test_the_address_for_blocks_can_be_another_one() -> None:
    assert (await ServerName("127.0.0.1", 7000, kv_host="10.0.0.9").look_up()).kv_host == "10.0.0.9"


async def test_a_name_that_moved_leads_elsewhere_at_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.1", "127.0.0.2"]
    known = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> object:
        return known(addresses.pop(0) if host == "router.example" else host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    name = ServerName("router.example", 7000)
    found = [(await name.look_up()).endpoint for _ in range(2)]
    assert found == ["tcp://127.0.0.1:7000", "tcp://127.0.0.2:7000"]


async def test_an_unknown_name_is_no_lasting_fault() -> None:
    with pytest.raises(UnavailableError, match=r"no-such-host\.invalid cannot be found"):
        await ServerName("no-such-host.invalid", 7000).look_up()


def test_a_name_is_shown_as_it_was_given() -> None:
    assert [str(ServerName(host, 7000)) for host in ("router.example", "::1")] == ["router.example:7000", "[::1]:7000"]
