"""The batch of a step: what each tensor holds for decodes, chunks, and rows with prompt log-probabilities."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.request import GenerationRequest
from disagg.base.sampling import SamplingParams
from disagg.engine.batch_builder import BatchBuilder
from disagg.engine.sequences import LiveSequence, Work
from disagg.scheduling.step.actions import Chunk

BLOCK = 4


def work(prompt: list[int], start: int, num_tokens: int, outputs: tuple[int, ...] = (), **sampling: Any) -> Work:
    """A chunk whose blocks are numbered from the prompt's first token on."""
    request = GenerationRequest(
        request_id=RequestId(str(prompt[0])),
        epoch=Epoch(1),
        prompt_token_ids=tuple(prompt),
        output_token_ids=outputs,
        sampling=SamplingParams(**{"max_tokens": 8, "seed": 0, **sampling}),
    )
    end = start + num_tokens
    blocks = tuple(BlockId(prompt[0] + n) for n in range(-(-end // BLOCK)))
    chunk = Chunk(request.request_id, start, num_tokens, blocks, end == request.num_tokens)
    return Work(LiveSequence(request), chunk)


@pytest.fixture
def builder() -> BatchBuilder:
    return BatchBuilder(max_tokens=8, max_sequences=4, max_blocks=2, device=torch.device("cpu"))


def test_a_step_of_decodes(builder: BatchBuilder) -> None:
    batch = builder.build([work([10, 11, 12], 3, 1, outputs=(13,)), work([20, 21, 22, 23], 4, 1, outputs=(24,))])
    assert batch.token_ids.tolist() == [13, 24]
    assert batch.positions.tolist() == [3, 4]
    assert batch.query_start.tolist() == [0, 1, 2]
    assert batch.context_lens.tolist() == [4, 5]
    assert batch.block_tables.tolist() == [[10, 0], [20, 21]]
    assert batch.logit_rows.tolist() == [0, 1]
    assert (batch.max_query_len, batch.max_context_len) == (1, 5)


def test_what_is_left_from_the_last_step_is_what_this_one_has(builder: BatchBuilder) -> None:
    def decode(first: int, length: int) -> Work:
        return work(list(range(first, first + length)), length - 1, 1)

    one, other, longer = decode(10, 3), decode(20, 4), decode(30, 6)
    for step in ([one, other], [one, other], [other, one], [one, longer], [other, longer], [one], [work([7, 8], 0, 1)]):
        kept, fresh = builder.build(step), BatchBuilder(8, 4, 2, torch.device("cpu")).build(step)
        for name in ("token_ids", "positions", "query_start", "context_lens", "block_tables", "logit_rows"):
            assert getattr(kept, name).tolist() == getattr(fresh, name).tolist(), name


def test_chunks_and_a_decode_together(builder: BatchBuilder) -> None:
    first = work([30, 31, 32, 33, 34, 35], 0, 4)
    last = work([40, 41, 42, 43, 44], 3, 2)
    batch = builder.build([work([10], 1, 1, outputs=(11,)), first, last])
    assert batch.token_ids.tolist() == [11, 30, 31, 32, 33, 43, 44]
    assert batch.positions.tolist() == [1, 0, 1, 2, 3, 3, 4]
    assert batch.query_start.tolist() == [0, 1, 5, 7]
    assert batch.context_lens.tolist() == [2, 4, 5]
    assert batch.block_tables.tolist() == [[10, 0], [30, 0], [40, 41]]
    assert batch.logit_rows.tolist() == [0, 6]  # the middle one does not sample yet
    assert (batch.max_query_len, batch.max_context_len) == (4, 5)


def test_prompt_logprobs_add_the_rows_that_predict_prompt_tokens(builder: BatchBuilder) -> None:
    whole = work([10, 11, 12], 0, 3, prompt_logprobs=2)
    batch = builder.build([work([20, 21], 0, 2), whole])
    # Row 1 and row 4 sample; rows 2 and 3 predict the tokens 11 and 12.
    assert batch.logit_rows.tolist() == [1, 4, 2, 3]


def test_prompt_logprobs_of_a_chunk_reach_into_the_next_one(builder: BatchBuilder) -> None:
    assert builder.build([work([10, 11, 12, 13], 0, 2, prompt_logprobs=0)]).logit_rows.tolist() == [0, 1]
    assert builder.build([work([10, 11, 12, 13], 2, 2, prompt_logprobs=0)]).logit_rows.tolist() == [1, 0]


def test_a_step_larger_than_usual_makes_the_buffers_grow(builder: BatchBuilder) -> None:
    prompt = list(range(50, 90))
    batch = builder.build([work(prompt, 0, 40)] * 6)
    assert batch.token_ids.tolist() == prompt * 6
    assert batch.block_tables.shape == (6, 10)
    assert batch.context_lens.tolist() == [40] * 6


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(1, 100)).flatmap(
            lambda drawn: st.tuples(st.just(drawn[0]), st.integers(0, drawn[0] - 1), st.just(drawn[1]))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_rows_are_the_chunks_one_after_the_other(chunks: list[tuple[int, int, int]]) -> None:
    builder = BatchBuilder(max_tokens=4, max_sequences=2, max_blocks=1, device=torch.device("cpu"))
    step = [work(list(range(first, first + end)), start, end - start) for end, start, first in chunks]
    for _ in range(2):  # what an earlier step left in the buffers does not show
        batch = builder.build(step)
        expected = [(first + p, p) for end, start, first in chunks for p in range(start, end)]
        assert list(zip(batch.token_ids.tolist(), batch.positions.tolist(), strict=True)) == expected
        assert batch.query_start.tolist() == np.cumsum([0] + [end - start for end, start, _ in chunks]).tolist()
        builder.build([work([1] * 9, 0, 9)])
