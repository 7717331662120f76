"""An instance's sockets to its routers: where a further router is found."""

import zmq

from disagg.base.ids import InstanceId, RouterId
from disagg.base.messages import Loading
from disagg.base.router_messages import SAME_HOST
from disagg.engine.control import ControlChannel

ONE = InstanceId("one")


def test_a_router_of_the_same_host_is_found_where_the_first_one_was_reached() -> None:
    """The host of a router that listens at all of its addresses is known to the instance alone."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as first, context.socket(zmq.ROUTER) as other:
        first.setsockopt(zmq.LINGER, 0)
        channel = ControlChannel(f"tcp://127.0.0.1:{first.bind_to_random_port('tcp://127.0.0.1')}", ONE)
        try:
            channel.join(RouterId("0.1"), f"{SAME_HOST}{other.bind_to_random_port('tcp://*')}")
            channel.send_to(RouterId("0.1"), Loading(instance=ONE, stage="weights", fraction=0.5))
            assert other.poll(10_000), "nothing came"
            assert other.recv_multipart()[0] == b"one"
        finally:
            channel.close()
