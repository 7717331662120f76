"""The control plane's wire: what goes in comes out, and nothing else is accepted."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base import messages
from disagg.base.errors import ProtocolError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, PositionLogprobs, SamplingParams, TokenLogprob


def request() -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId("r"),
        epoch=Epoch(3),
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=5, seed=2**64 - 1, stop_token_ids=(7,)),
        eos_token_ids=(2,),
    )


def test_a_message_survives_the_wire() -> None:
    generate = messages.Generate(request=request(), hand_over=True)
    assert messages.decode_for_engine(messages.encode(generate)) == generate
    chosen = PositionLogprobs(TokenLogprob(5, -0.1, 1), (TokenLogprob(5, -0.1, 1),))
    output = messages.SequenceOutput(RequestId("r"), Epoch(3), (5,), FinishReason.STOP, logprobs=(chosen,))
    step = messages.StepOutput(outputs=(output,))
    assert messages.decode_for_router(messages.encode(step)) == step


def test_each_side_refuses_the_other_sides_messages() -> None:
    stop = messages.encode(messages.Stop())
    with pytest.raises(ProtocolError, match="malformed message to the router"):
        messages.decode_for_router(stop)


@given(st.binary(max_size=200))
def test_garbage_is_refused_never_raised_raw(data: bytes) -> None:
    for decode in (messages.decode_for_engine, messages.decode_for_router):
        try:
            decode(data)
        except ProtocolError:
            continue


def test_a_field_of_the_wrong_type_is_named() -> None:
    wrong = msgspec.msgpack.encode({"type": "Abort", "request_id": 5, "epoch": 1})
    with pytest.raises(ProtocolError, match="request_id"):
        messages.decode_for_engine(wrong)


def test_an_overlong_message_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(ProtocolError, match="over the limit of 10"):
        messages.encode(messages.PeerLost(instance=InstanceId("prefill-0"), incarnation="x"))
