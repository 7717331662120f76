"""KV events for other routers: what a subscriber that knows vLLM's format reads."""

import msgspec
import pytest
import zmq

from disagg.base.errors import ConfigurationError
from disagg.base.ids import BlockHash, InstanceId
from disagg.base.kv_events import BlockRemoved, BlockStored, Medium
from disagg.base.messages import KvEvents
from disagg.serve.router.kv_publisher import KvEventPublisher

STORED = BlockStored((BlockHash(b"a"), BlockHash(b"b")), BlockHash(b"p"), (1, 2, 3, 4), 2, None, Medium.CPU)


def said(number: int, *events) -> KvEvents:
    return KvEvents(instance=InstanceId("decode-0"), incarnation="x", number=number, events=events)


def test_a_subscriber_reads_vllm_s_batches() -> None:
    publisher = KvEventPublisher("tcp://127.0.0.1:*", "tiny")
    context = zmq.Context()
    reader = context.socket(zmq.SUB)
    reader.setsockopt(zmq.LINGER, 0)
    reader.setsockopt(zmq.RCVTIMEO, 100)
    reader.setsockopt(zmq.SUBSCRIBE, b"kv@decode-0@")
    reader.connect(publisher.endpoint)
    try:
        for number in range(1, 100):  # a subscription takes a moment to arrive
            publisher.publish(said(number, STORED))
            try:
                topic, counted, data = reader.recv_multipart()
                break
            except zmq.Again:
                continue
        assert topic == b"kv@decode-0@tiny"
        time_s, events, rank = msgspec.msgpack.decode(data)
        assert time_s > 1e9
        assert rank is None
        assert events == [["BlockStored", [b"a", b"b"], b"p", [1, 2, 3, 4], 2, None, "CPU"]]

        publisher.publish(said(0, BlockRemoved((BlockHash(b"a"),), Medium.DISK)))
        _, then, data = reader.recv_multipart()
        assert int.from_bytes(then, "big") == int.from_bytes(counted, "big") + 1
        assert msgspec.msgpack.decode(data)[1] == [["AllBlocksCleared"], ["BlockRemoved", [b"a"], "DISK"]]
    finally:
        reader.close()
        context.term()
        publisher.close()


def test_an_endpoint_that_cannot_be_is_named() -> None:
    with pytest.raises(ConfigurationError, match="--kv-events nonsense"):
        KvEventPublisher("nonsense", "tiny")
