"""Grammars in the engine: a sequence's place in its grammar is a function of its tokens, and nothing else is chosen."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.errors import InvalidRequestError
from disagg.base.ids import Epoch, RequestId
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, SamplingParams
from disagg.engine.grammar import Grammars, GrammarState
from disagg.engine.kernels.select import BACKENDS, select_backend
from disagg.engine.model.adjustments import SamplingRow
from disagg.engine.model.sampler import chooser_of, sample
from disagg.engine.sequences import LiveSequence
from disagg.models.grammar import GrammarCompiler
from disagg.models.locate import locate_model
from disagg.models.tokenizer import load_tokenizer

VOCAB_SIZE = 301
"""Wider than the tokenizer, which has a token for each byte, ``<bos>`` and ``<eos>``."""
EOS = 257
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": json.dumps({"grammars": [{"json_schema": PERSON}]}),
    "regex": "start: /[a-c]{2,5}(x|yz)*/",
    "choice": 'start: "yes" | "no" | "yes, please"',
    "recursive": 'start: "(" start ")" | "o"',
}


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def compiler(folder: Path) -> GrammarCompiler:
    return GrammarCompiler(load_tokenizer(locate_model(str(folder))), VOCAB_SIZE, (EOS,))


def state(compiler: GrammarCompiler, grammar: str, tokens: Sequence[int] = ()) -> GrammarState:
    compiled: Future[llguidance.LLMatcher] = Future()
    compiled.set_result(compiler.compile(grammar))
    return GrammarState(compiled, tokens)


def test_the_first_grammar_finds_the_vocabulary_read(compiler: GrammarCompiler) -> None:
    """An instance reads it while it loads: made by the first step with a grammar, it would hold up all others."""
    made: list[tuple[int, ...]] = []

    def make(eos_token_ids: tuple[int, ...]) -> GrammarCompiler:
        made.append(eos_token_ids)
        return compiler

    with ThreadPoolExecutor(1) as thread:
        grammars = Grammars(make, thread)
        grammars.prepare(lambda: (EOS,)).result()
        assert made == [(EOS,)]
        begun = grammars.state_of(asking(GRAMMARS["choice"], max_tokens=5))
        assert begun is not None
        assert not begun.is_complete
    assert made == [(EOS,)]


def test_a_model_without_an_end_is_served_without_grammars(folder: Path) -> None:
    endless = GrammarCompiler(load_tokenizer(locate_model(str(folder))), VOCAB_SIZE, ())
    with ThreadPoolExecutor(1) as thread:
        grammars = Grammars(lambda _: endless, thread)
        assert grammars.prepare(tuple).exception() is None


def asking(grammar: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId("one"),
        epoch=Epoch(0),
        prompt_token_ids=(1,),
        sampling=SamplingParams(seed=0, grammar=grammar, **sampling),
        eos_token_ids=(EOS,),
    )


def allowed(state: GrammarState) -> list[int]:
    bits = np.zeros(-(-VOCAB_SIZE // 32), dtype=np.uint32)
    state.fill(bits)
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


@given(data=st.data(), grammar=st.sampled_from(sorted(GRAMMARS)))
def test_interrupted_anywhere_is_uninterrupted(compiler: GrammarCompiler, data: st.DataObject, grammar: str) -> None:
    """Hand-over, preemption and resume give an instance the tokens so far: from there on all is as it was."""
    whole, tokens = state(compiler, GRAMMARS[grammar]), []
    for _ in range(data.draw(st.integers(1, 25))):
        choices = [token for token in allowed(whole) if token != EOS]
        if whole.is_complete or not choices:
            break
        tokens.append(data.draw(st.sampled_from(choices)))
        whole.accept(tokens[-1])
    resumed = state(compiler, GRAMMARS[grammar], tokens[: data.draw(st.integers(0, len(tokens)))])
    for token in tokens[len(resumed._unread) :]:
        resumed.accept(token)
    assert not whole.failure
    assert (allowed(resumed), resumed.is_complete) == (allowed(whole), whole.is_complete)
    assert max(allowed(whole), default=0) <= EOS, "ids that no text has are never allowed"


def test_a_complete_text_ends_its_sequence_without_another_token(compiler: GrammarCompiler) -> None:
    request = asking(GRAMMARS["choice"], max_tokens=3, min_tokens=3)
    sequence = LiveSequence(request, grammar=state(compiler, GRAMMARS["choice"]))
    for token in b"n":
        sequence.append(token)
    assert sequence.finished is None
    sequence.append(ord("o"))
    assert (sequence.finished, sequence.stop_token_id) == (FinishReason.STOP, None)


def test_a_text_that_max_tokens_cuts_says_length(compiler: GrammarCompiler) -> None:
    request = asking(GRAMMARS["choice"], max_tokens=2)
    sequence = LiveSequence(request, grammar=state(compiler, GRAMMARS["choice"]))
    for token in b"ye":
        sequence.append(token)
    assert sequence.finished is FinishReason.LENGTH


def test_tokens_against_the_grammar_end_it_with_words(compiler: GrammarCompiler) -> None:
    lost = state(compiler, GRAMMARS["choice"], list(b"maybe"))
    assert allowed(lost) == []
    assert "cannot go on by the grammar" in lost.failure


def test_a_grammar_that_does_not_compile_fails_its_sequence_alone(folder: Path) -> None:
    with ThreadPoolExecutor(1) as thread:
        tokenizer = load_tokenizer(locate_model(str(folder)))
        grammars = Grammars(lambda eos: GrammarCompiler(tokenizer, VOCAB_SIZE, eos), thread)
        broken = grammars.state_of(asking("start: nobody", max_tokens=2))
        assert broken is not None
        assert allowed(broken) == []
    assert "the grammar cannot be used" in broken.failure


def test_a_grammar_over_no_end_token_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidRequestError, match="no token that ends an answer"):
        GrammarCompiler(load_tokenizer(locate_model(str(folder))), VOCAB_SIZE, ()).compile(GRAMMARS["choice"])


class TestChoice:
    """Masks in the sampler, of every backend and element type."""

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_only_allowed_tokens_are_chosen(
        self, compiler: GrammarCompiler, backend: str, dtype: torch.dtype, temperature: float
    ) -> None:
        chooser = chooser_of(select_backend(torch.device("cpu"), dtype, backend))
        rows = [self.row(compiler, temperature, logprobs=index % 2 or None) for index in range(5)]
        rows[2] = SamplingRow(SamplingParams(max_tokens=9, seed=2, temperature=0.0), (1,))
        logits = torch.randn(5, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)
        unmasked = int(logits[2].argmax())
        before = logits.clone()
        tokens = [token for token in sample(logits, rows, chooser) if token is not None]
        assert [token.token_id in {*b"yn"} for token in tokens] == [True, True, False, True, True]
        assert tokens[2].token_id == unmasked, "rows without a grammar are left as they are"
        raw = before[1].float().log_softmax(-1)[tokens[1].token_id]
        assert tokens[1].logprobs is not None
        assert tokens[1].logprobs.chosen.logprob == pytest.approx(float(raw), abs=1e-2), "of the raw logits"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_allowed_tokens_and_bad_words(self, backend: str) -> None:
        chooser = chooser_of(select_backend(torch.device("cpu"), torch.float32, backend))
        logits = torch.arange(VOCAB_SIZE, dtype=torch.float32).unsqueeze(0)

        def best(output: tuple[int, ...] = (), **params: Any) -> int:
            row = SamplingRow(SamplingParams(max_tokens=9, seed=0, temperature=0.0, **params), (1,), output)
            (token,) = sample(logits.clone(), [row], chooser)
            assert token is not None
            return token.token_id

        top = VOCAB_SIZE - 1
        assert best(allowed_token_ids=(3, 64, 31)) == 64
        assert best(bad_words=((top,),)) == top - 1
        assert best(bad_words=((7, 8, top),)) == top
        assert best((7, 8), bad_words=((7, 8, top),)) == top - 1
        assert best((8, 7), bad_words=((7, 8, top),)) == top
        assert best((7,), bad_words=((7, 8, top), (7, top), (top - 1,))) == top - 2

    def test_nothing_allowed_is_nothing_chosen(self, compiler: GrammarCompiler) -> None:
        row = self.row(compiler, 1.0)
        assert row.grammar is not None
        for token in b"maybe":
            row.grammar.accept(token)  # type: ignore[attr-defined]
        assert sample(torch.zeros(1, VOCAB_SIZE), [row]) == [None]
        assert row.is_to_blame(torch.zeros(VOCAB_SIZE))

    def row(self, compiler: GrammarCompiler, temperature: float, **params: Any) -> SamplingRow:
        sampling = SamplingParams(max_tokens=9, seed=1, temperature=temperature, **params)
        return SamplingRow(sampling, (1,), grammar=state(compiler, GRAMMARS["choice"]))
