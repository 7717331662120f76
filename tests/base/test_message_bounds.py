"""What an instance says of itself is believed only within bounds, and nothing that it sends raises anything raw."""

import math
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base import messages
from disagg.base.errors import ProtocolError
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import SamplingParams

FACTS = messages.InstanceFacts(
    pid=1,
    device="cpu",
    kernel_backend="native",
    num_blocks=10,
    block_size=64,
    max_model_len=512,
    vocab_size=320,
    weight_bytes=1000,
    kv_bytes=1000,
    load_s=0.5,
    pool=b"pool",
)
OFFER = messages.KvOffer(
    request_id=RequestId("r"),
    epoch=Epoch(0),
    source=InstanceId("prefill-0"),
    incarnation="a",
    num_tokens=5,
    block_size=4,
    block_ids=(BlockId(3), BlockId(4)),
    lease_s=10.0,
    pool=b"pool",
)
OUTPUT = messages.SequenceOutput(RequestId("r"), Epoch(0), (5, 6), stamps=messages.StageStamps(1.0, 2.0, 3.0, 4.0, 5.0))
LOAD = messages.InstanceLoad(num_running=1, blocks_total=10, blocks_free=10)
INSTANCE = {"instance": InstanceId("prefill-0"), "incarnation": "a"}
SEQUENCE = {"request_id": RequestId("r"), "epoch": Epoch(0)}
REQUEST = GenerationRequest(**SEQUENCE, prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=3, seed=1))
TO_ROUTER: list[messages.Message] = [
    messages.Ready(version=1, role=Role.PREFILL, facts=FACTS, **INSTANCE),
    messages.Loading(instance=InstanceId("prefill-0"), stage="weights", fraction=0.5),
    messages.StepOutput(outputs=(OUTPUT,)),
    messages.Offered(offer=OFFER),
    messages.Pulled(source=InstanceId("prefill-0"), num_bytes=10, duration_s=0.1, **SEQUENCE),
    messages.Failed(kind=messages.FailureKind.INTERNAL, message="no", **SEQUENCE),
    messages.LoadReport(load=LOAD, **INSTANCE),
]
TO_ENGINE: list[messages.Message] = [
    messages.Generate(request=REQUEST),
    messages.Adopt(request=REQUEST, offer=OFFER),
    messages.Abort(**SEQUENCE),
    messages.Release(**SEQUENCE),
    messages.PeerLost(**INSTANCE),
    messages.Stop(),
]


@pytest.mark.parametrize("message", TO_ROUTER, ids=lambda message: type(message).__name__)
def test_what_can_be_is_believed(message: messages.Message) -> None:
    assert messages.decode_for_router(messages.encode(message)) == message


def _altered(value: Any, name: str, wrong: object) -> Any:
    return msgspec.structs.replace(value, **{name: wrong})


BAD_FACTS = [(name, wrong) for name in ("num_blocks", "block_size", "max_model_len", "vocab_size") for wrong in (-5, 0)]
BAD_FACTS += [("max_model_len", 2**63), ("pid", -1), ("kv_bytes", -1), ("load_s", math.nan), ("load_s", math.inf)]
BAD_FACTS += [("load_s", -1.0), ("device", "x" * 1000)]
BAD_OFFERS = [("block_ids", (-1,)), ("block_ids", (2**31,)), ("num_tokens", 0), ("num_tokens", -1), ("epoch", -1)]
BAD_OFFERS += [("lease_s", math.nan), ("lease_s", math.inf)]
BAD_OUTPUTS = [("token_ids", (-1,)), ("token_ids", (2**31,)), ("stop_token_id", -1), ("num_cached_tokens", -1)]
BAD_OUTPUTS += [("stamps", messages.StageStamps(value)) for value in (math.nan, math.inf, -1.0)]
BAD: list[messages.Message] = [
    *(_altered(TO_ROUTER[0], "facts", _altered(FACTS, name, wrong)) for name, wrong in BAD_FACTS),
    *(messages.Offered(offer=_altered(OFFER, name, wrong)) for name, wrong in BAD_OFFERS),
    *(messages.StepOutput(outputs=(_altered(OUTPUT, name, wrong),)) for name, wrong in BAD_OUTPUTS),
    *(_altered(TO_ROUTER[6], "load", _altered(LOAD, name, -1)) for name in messages.InstanceLoad.__struct_fields__),
    *(_altered(TO_ROUTER[1], "fraction", wrong) for wrong in (-0.1, 1.1, math.nan)),
    _altered(TO_ROUTER[4], "num_bytes", -1),
    _altered(TO_ROUTER[4], "duration_s", math.nan),
]


@pytest.mark.parametrize("message", BAD, ids=lambda message: type(message).__name__)
def test_what_cannot_be_is_refused(message: messages.Message) -> None:
    with pytest.raises(ProtocolError, match="malformed message to the router"):
        messages.decode_for_router(msgspec.msgpack.encode(message))


def test_forged_block_ids_do_not_reach_an_engine_either() -> None:
    adopt = messages.Adopt(request=REQUEST, offer=_altered(OFFER, "block_ids", (-1,)))
    with pytest.raises(ProtocolError):
        messages.decode_for_engine(msgspec.msgpack.encode(adopt))


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa4type\xa1\xff",
        b"\x82\xa4type\xa5Abort\xaarequest_id\xa1\xff",
        b"\x82\xa4type\xa4Stop\xa1z" + b"\x91" * 200_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x82\xa4type\xaaStepOutput\xa7outputs\xdd\xff\xff\xff\xff",
    ],
    ids=["tag", "text", "nesting", "length", "inner length"],
)
@pytest.mark.parametrize("decode", [messages.decode_for_engine, messages.decode_for_router])
def test_broken_bytes_are_refused(decode: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


NUMBERS = st.one_of(st.integers(-(2**63), 2**64 - 1), st.floats(), st.sampled_from([-1, 0, 2**31, 2**62]))
LEAVES = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=10), st.binary(max_size=10))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(leaf for key, inner in items for leaf in _leaves(inner, (*path, key)))]


@given(st.data())
def test_a_mutated_message_is_valid_or_refused(data: st.DataObject) -> None:
    decode, kinds = data.draw(
        st.sampled_from([(messages.decode_for_router, TO_ROUTER), (messages.decode_for_engine, TO_ENGINE)])
    )
    tree = msgspec.msgpack.decode(messages.encode(data.draw(st.sampled_from(kinds))))
    *way, last = data.draw(st.sampled_from([path for path in _leaves(tree) if path]))
    place = tree
    for step in way:
        place = place[step]
    place[last] = data.draw(VALUES)
    _decodes_or_refuses(decode, msgspec.msgpack.encode(tree))


@given(st.data())
def test_flipped_bytes_are_valid_or_refused(data: st.DataObject) -> None:
    decode, kinds = data.draw(
        st.sampled_from([(messages.decode_for_router, TO_ROUTER), (messages.decode_for_engine, TO_ENGINE)])
    )
    encoded = bytearray(messages.encode(data.draw(st.sampled_from(kinds))))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    _decodes_or_refuses(decode, bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


def _decodes_or_refuses(decode: Callable[[bytes], Any], data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    for number in _numbers(msgspec.to_builtins(message, enc_hook=str)):
        assert math.isfinite(number) or decode is messages.decode_for_engine
    if isinstance(message, messages.Ready):
        assert message.facts.max_model_len > 0
        assert struct.pack("q", message.facts.num_blocks)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [number for one in inner for number in _numbers(one)]
