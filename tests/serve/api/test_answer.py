"""From outputs of the engine to what the client sees of one choice."""

from collections.abc import Sequence
from typing import Any

from api_site import EOS, ids_of
from hypothesis import given
from hypothesis import strategies as st
from scripted_router import logprobs_of

from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, SamplingParams
from disagg.models.tokenizer import IncrementalDecoder, Tokenizer
from disagg.serve.api.answer import Answer, Delta, StopString, TextStream


def make_answer(tokenizer: Tokenizer, stops: Sequence[str] = (), include: bool = False, **sampling: Any) -> Answer:
    request = GenerationRequest(
        request_id=RequestId("one-0"),
        epoch=Epoch(0),
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=1000, seed=0, **sampling),
    )
    wanted = [StopString(stop) for stop in stops]
    return Answer(0, request, TextStream(IncrementalDecoder(tokenizer), wanted, include_stop_string=include))


def make_output(token_ids: Sequence[int], reason: FinishReason | None = None, **fields: Any) -> SequenceOutput:
    return SequenceOutput(
        request_id=RequestId("one-0"),
        epoch=Epoch(0),
        token_ids=tuple(token_ids),
        finish_reason=reason,
        stop_token_id=token_ids[-1] if reason is FinishReason.STOP else None,
        **fields,
    )


def accept_all(answer: Answer, outputs: Sequence[SequenceOutput]) -> list[Delta]:
    deltas = []
    for output in outputs:
        deltas.append(answer.accept(output))
        if answer.finish_reason is not None:
            break
    return deltas


def test_the_end_of_sequence_token_is_no_text_and_no_stop_reason(tokenizer: Tokenizer) -> None:
    (delta,) = accept_all(make_answer(tokenizer), [make_output([*ids_of("Hi"), EOS], FinishReason.STOP)])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("Hi", FinishReason.STOP, None)
    assert len(delta.token_ids) == 3


def test_a_stop_token_of_the_client_is_the_stop_reason(tokenizer: Tokenizer) -> None:
    answer = make_answer(tokenizer, stop_token_ids=(33,))
    (delta,) = accept_all(answer, [make_output(ids_of("Hi!"), FinishReason.STOP)])
    assert (delta.text, delta.stop_reason) == ("Hi", 33)


def test_a_stop_token_is_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    answer = make_answer(tokenizer, include=True, stop_token_ids=(33,))
    (delta,) = accept_all(answer, [make_output(ids_of("Hi!"), FinishReason.STOP)])
    assert delta.text == "Hi!"


def test_tokens_after_a_stop_string_are_not_the_clients(tokenizer: Tokenizer) -> None:
    answer = make_answer(tokenizer, ["b"])
    output = make_output(ids_of("abcd"), FinishReason.LENGTH, logprobs=tuple(map(logprobs_of, ids_of("abcd"))))
    (delta,) = accept_all(answer, [output])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "b")
    assert delta.token_ids == tuple(ids_of("ab"))
    assert len(delta.logprobs) == len(delta.offsets) == answer.num_tokens == 2


def test_a_stop_string_completed_by_the_last_character_still_cuts(tokenizer: Tokenizer) -> None:
    # Half a character is left when the answer ends; what shows for it is the stop string.
    answer = make_answer(tokenizer, ["\ufffd"])
    (delta,) = accept_all(answer, [make_output("a€".encode()[:2], FinishReason.LENGTH)])
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("a", FinishReason.STOP, "\ufffd")


@given(text=st.text(max_size=20), data=st.data(), stops=st.lists(st.text(min_size=1, max_size=2), max_size=2))
def test_how_tokens_are_grouped_into_outputs_changes_nothing(
    text: str, data: st.DataObject, stops: list[str], tokenizer: Tokenizer
) -> None:
    token_ids = [*ids_of(text), EOS]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(token_ids)))) | {len(token_ids)})
    outputs = [
        make_output(token_ids[start:end], FinishReason.STOP if end == len(token_ids) else None)
        for start, end in zip([0, *cuts], cuts, strict=False)
    ]
    whole = make_answer(tokenizer, stops)
    (expected,) = accept_all(whole, [make_output(token_ids, FinishReason.STOP)])
    grouped = make_answer(tokenizer, stops)
    deltas = accept_all(grouped, outputs)
    assert "".join(delta.text for delta in deltas) == expected.text
    assert [token for delta in deltas for token in delta.token_ids] == list(expected.token_ids)
    assert [offset for delta in deltas for offset in delta.offsets] == list(expected.offsets)
    assert deltas[-1].stop_reason == expected.stop_reason
