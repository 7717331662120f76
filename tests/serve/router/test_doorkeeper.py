"""No other process can speak as an instance."""

import asyncio
from pathlib import Path

import pytest
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from disagg.base.ids import InstanceId
from disagg.base.messages import Loading, Stop, encode
from disagg.engine.control import ControlChannel
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.doorkeeper import SharedKey

KEY = "k" * 64
P0 = InstanceId("prefill-0")
DEADLINE_S = 20.0
TURNED_AWAY = {
    zmq.EVENT_DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
}


class Desk:
    """A control socket that keeps what it hears."""

    def __init__(self, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/control"
        self.socket = ZmqControlSocket(self.endpoint, SharedKey(KEY))
        self.heard: list[tuple[InstanceId, bytes]] = []
        self.socket.open(lambda instance, data: self.heard.append((instance, data)))

    async def hears(self, num: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.heard) < num:
                await asyncio.sleep(0.001)


@pytest.fixture
async def desk(tmp_path: Path):
    desk = Desk(tmp_path)
    yield desk
    desk.socket.close()


async def test_an_instance_is_heard_and_hears(desk: Desk) -> None:
    channel = ControlChannel(desk.endpoint, P0, KEY)
    message = Loading(instance=P0, stage="weights", fraction=0.5)
    channel.send(message)
    await desk.hears(1)
    assert desk.heard == [(P0, encode(message))]
    desk.socket.send(P0, encode(Stop()))
    assert await asyncio.to_thread(channel.receive, DEADLINE_S) == [Stop()]
    channel.close()


STRANGERS = {
    "no key": {},
    "a guess": {"plain_username": b"prefill-0", "plain_password": b"guess"},
    "half the key": {"plain_username": b"prefill-0", "plain_password": KEY[:32].encode()},
    "CURVE": dict(zip(("curve_publickey", "curve_secretkey"), zmq.curve_keypair(), strict=True))
    | {"curve_serverkey": zmq.curve_keypair()[0]},
}


@pytest.mark.parametrize("who", STRANGERS)
async def test_a_stranger_is_not_heard_and_takes_nobodys_place(desk: Desk, who: str) -> None:
    channel = ControlChannel(desk.endpoint, P0, KEY)
    channel.send(Loading(instance=P0, stage="first", fraction=0.0))
    await desk.hears(1)
    with zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.ROUTING_ID, P0.encode())
        for name, value in STRANGERS[who].items():
            stranger.setsockopt(getattr(zmq, name.upper()), value)
        monitor = stranger.get_monitor_socket()
        stranger.connect(desk.endpoint)
        await stranger.send(b"forged", flags=zmq.NOBLOCK)
        async with asyncio.timeout(DEADLINE_S):
            while (await recv_monitor_message(monitor))["event"] not in TURNED_AWAY:
                pass
        stranger.disable_monitor()
        monitor.close()
    desk.socket.send(P0, encode(Stop()))
    assert await asyncio.to_thread(channel.receive, DEADLINE_S) == [Stop()]
    assert len(desk.heard) == 1
    channel.close()
