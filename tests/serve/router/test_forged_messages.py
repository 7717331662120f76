"""Bytes that are no message change nothing in a live router."""

import asyncio

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg.base.config import RouterSettings
from disagg.base.errors import ProtocolError
from disagg.base.ids import InstanceId
from disagg.base.messages import decode_for_router
from disagg.base.request import Role
from disagg.serve.router.control_socket import Receiver
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.watcher import NullWatcher

NAMES = [InstanceId("prefill-0"), InstanceId("decode-0"), InstanceId("nobody"), InstanceId("\ufffd")]


class NoSocket:
    """A control socket whose receiver the test calls itself."""

    def open(self, receive: Receiver) -> None:
        self.receive = receive

    def send(self, instance: InstanceId, data: bytes) -> None:
        raise AssertionError("nothing is sent")

    def close(self) -> None:
        pass


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.binary(max_size=100)), max_size=2))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_garbage_changes_nothing(received: list[tuple[InstanceId, bytes]]) -> None:
    async def play() -> None:
        socket = NoSocket()
        router = LiveRouter({name: Role(name.split("-")[0]) for name in NAMES[:2]}, RouterSettings(), socket)
        router.start(NullWatcher())
        before = router.instances()
        for instance, data in received:
            try:
                decode_for_router(data)
            except ProtocolError:
                socket.receive(instance, data)
        assert router.instances() == before
        router.close()

    asyncio.run(play())
