"""Waiting for the first instances of a live router."""

import asyncio
from pathlib import Path

import pytest
import zmq.asyncio
from scripted_peer import DEADLINE_S, ScriptedPeer

from disagg.base.config import RouterSettings
from disagg.base.errors import OverloadedError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.start_gate import StartGate
from disagg.serve.router.watcher import NullWatcher

PAIR = {InstanceId("prefill-0"): Role.PREFILL, InstanceId("decode-0"): Role.DECODE}


async def test_the_first_whole_path_ends_the_wait(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/control"
    router = LiveRouter(PAIR, RouterSettings(), ZmqControlSocket(endpoint))
    router.start(NullWatcher())
    waiting = asyncio.create_task(router.wait_started())
    with zmq.asyncio.Context() as context:
        for name in PAIR:
            assert not waiting.done()
            peer = ScriptedPeer(context, endpoint, name)
            await peer.get_ready()
            async with asyncio.timeout(DEADLINE_S):
                while not any(status.facts and status.instance == name for status in router.instances()):
                    await asyncio.sleep(0)
            peer.close()
        await asyncio.wait_for(waiting, DEADLINE_S)
        router.close()


async def test_the_end_of_the_server_ends_the_wait() -> None:
    router = LiveRouter(PAIR, RouterSettings(), ZmqControlSocket("ipc://unused"))
    waiting = asyncio.create_task(router.wait_started())
    await asyncio.sleep(0)
    await router.drain(0.0)
    await asyncio.wait_for(waiting, DEADLINE_S)
    router.close()


async def test_the_wait_is_bounded_in_time_and_number() -> None:
    gate = StartGate(timeout_s=0.01, max_waiting=1)
    waiting = asyncio.create_task(gate.wait())
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="--max-queued-requests"):
        await gate.wait()
    with pytest.raises(UnavailableError, match="--instance-wait-s"):
        await waiting
    with pytest.raises(UnavailableError):
        await gate.wait()
