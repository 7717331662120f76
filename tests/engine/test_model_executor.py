"""Engine loops with a real (tiny, random) model in float32: two instances answer as one does, token for token."""

import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import BLOCK_SIZE, Instance, RouterEnd, ServedModel, hand_over, request
from msgspec import structs

from disagg.base.block_hash import hash_blocks
from disagg.base.config import CacheSettings, DType, ModelSettings, SchedulerSettings
from disagg.base.ids import RequestId
from disagg.base.messages import Failed, FailureKind, Generate, Pulled, SequenceOutput
from disagg.base.request import GenerationRequest
from disagg.base.sampling import PositionLogprobs
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.layout import KvFormat
from disagg.engine.batch_builder import BatchBuilder
from disagg.engine.facts import layer_tables, plan_capacity
from disagg.engine.kernels.native_backend import native_unavailable_reason
from disagg.engine.kernels.select import select_backend
from disagg.engine.kernels.torch_backend import TorchBackend
from disagg.engine.kv_store import DeviceKvStore, KvStore, SharedKvStore
from disagg.engine.model.decoder import Decoder
from disagg.engine.model.weights import load_weights
from disagg.engine.model_executor import ModelExecutor
from disagg.models.locate import load_config, locate_model
from disagg.transfer.pool import KvPool

LENGTHS = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 16, 17, 50)
VOCAB_SIZE = 1000


def staged(pool: KvPool) -> KvStore:
    """As on an accelerator: the pool is only a staging area."""
    return DeviceKvStore(pool, torch.device("cpu"))


LoadDecoder = Callable[[], Decoder]


@pytest.fixture(scope="module")
def load_decoder(tiny_model: Callable[..., Path]) -> LoadDecoder:
    """Each instance needs a decoder of its own: a kernel backend serves one step at a time."""
    files = locate_model(str(tiny_model("llama", vocab_size=VOCAB_SIZE)))
    config = load_config(files)

    def load() -> Decoder:
        backend = TorchBackend(KvFormat.INTERLEAVED)
        return Decoder(config, load_weights(files, config, backend, dtype=DType.FLOAT32), backend)

    return load


def served(load_decoder: LoadDecoder, make_store: Callable[[KvPool], KvStore] = SharedKvStore) -> ServedModel:
    decoder = load_decoder()
    # The native kernels have no smaller blocks.
    cache = CacheSettings(block_size=16 if decoder.backend.name == "native" else BLOCK_SIZE)
    capacity = plan_capacity(ModelSettings(dtype=DType.FLOAT32), cache, decoder.config, decoder.backend.kv_format)
    tables = layer_tables(decoder.config, capacity.layout)
    builder = BatchBuilder(16, 8, max_blocks=32, device=torch.device("cpu"), layer_tables=tables)
    return ServedModel(
        layout=capacity.layout,
        make_executor=lambda pool: ModelExecutor(decoder, make_store(pool), builder),
        vocab_size=decoder.config.vocab_size,
        max_model_len=capacity.max_model_len,
    )


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


def by_one_instance(
    router: RouterEnd, load_decoder: LoadDecoder, *sequences: GenerationRequest, **fields: Any
) -> list[Any]:
    """Each sequence's outputs from a colocated instance."""
    with Instance(router, "colocated-0", model=served(load_decoder), **fields) as engine:
        engine.send(*(Generate(request=sequence) for sequence in sequences))
        router.wait_for_end(*(sequence.request_id for sequence in sequences))
    outputs = [router.outputs(sequence.request_id) for sequence in sequences]
    router.received.clear()
    return outputs


def by_two_instances(
    router: RouterEnd,
    load_decoder: LoadDecoder,
    *sequences: GenerationRequest,
    make_store: Callable[[KvPool], KvStore] = SharedKvStore,
) -> list[list[SequenceOutput]]:
    """Each sequence's outputs from a prefill and a decode instance."""
    with (
        Instance(router, "prefill-0", "b1", model=served(load_decoder, make_store)) as prefill,
        Instance(router, "decode-0", "c1", model=served(load_decoder, make_store)) as decode,
    ):
        for sequence in sequences:
            hand_over(router, prefill, decode, sequence)
        router.wait_for_end(*(sequence.request_id for sequence in sequences))
        assert all(start > 0 for step in decode.executor.steps for start, _ in step.values())  # nothing was recomputed
    return [router.outputs(sequence.request_id) for sequence in sequences]


def tokens(outputs: list[list[SequenceOutput]]) -> list[list[int]]:
    return [[token for output in of_one for token in output.token_ids] for of_one in outputs]


SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 1.0, "seed": 11},
    "truncated and penalised": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 40,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((7, 2.0),),
    },
}


@pytest.mark.parametrize("make_store", [SharedKvStore, staged])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_two_instances_answer_as_one(
    router: RouterEnd, load_decoder: LoadDecoder, sampling: dict[str, Any], make_store: Callable[[KvPool], KvStore]
) -> None:
    sequences = [request(f"length-{length}", length, max_tokens=12, **sampling) for length in LENGTHS]
    alone = by_one_instance(router, load_decoder, *sequences)
    assert tokens(by_two_instances(router, load_decoder, *sequences, make_store=make_store)) == tokens(alone)
    assert len({tuple(answer) for answer in tokens(alone)}) > 1


EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
}  # fmt: skip


@pytest.mark.parametrize("backend_name", ["native", "torch"])
@pytest.mark.parametrize("model_type", EXPERTS)
def test_two_instances_answer_as_one_with_a_mixture_of_experts(
    router: RouterEnd, tiny_model: Callable[..., Path], model_type: str, backend_name: str
) -> None:
    files = locate_model(str(tiny_model(model_type, vocab_size=VOCAB_SIZE, **EXPERTS[model_type])))
    config = load_config(files)
    if backend_name == "native" and (reason := native_unavailable_reason(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)

    def load() -> Decoder:
        backend = select_backend(torch.device("cpu"), torch.float32, backend_name)
        return Decoder(config, load_weights(files, config, backend, dtype=DType.FLOAT32), backend)

    sequences = [request(f"length-{length}", length, max_tokens=12, temperature=0.0) for length in LENGTHS]
    alone = tokens(by_one_instance(router, load, *sequences))
    assert tokens(by_two_instances(router, load, *sequences)) == alone
    assert len({tuple(answer) for answer in alone}) > 1


@pytest.mark.parametrize("backend_name", ["native", "torch"])
@pytest.mark.parametrize("model_type", ["gemma2", "mistral"])
def test_keys_and_values_behind_a_window_are_not_handed_over(
    router: RouterEnd, tiny_model: Callable[..., Path], model_type: str, backend_name: str
) -> None:
    """Where they would have been there is NaN: nothing attends to it, also after later turns were found in the cache.

    In Gemma 2 every other layer slides, in Mistral every one.
    """
    if backend_name == "native" and (reason := native_unavailable_reason(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    window, size = (5, BLOCK_SIZE) if backend_name == "torch" else (20, 16)
    files = locate_model(str(tiny_model(model_type, vocab_size=VOCAB_SIZE, sliding_window=window)))
    config = load_config(files)

    def load() -> Decoder:
        backend = select_backend(torch.device("cpu"), torch.float32, backend_name)
        return Decoder(config, load_weights(files, config, backend, dtype=DType.FLOAT32), backend)

    sequence = request("a", 70, max_tokens=24, temperature=0.0)
    (alone,) = tokens(by_one_instance(router, load, sequence))
    next_turn = structs.replace(
        request("b", 1, max_tokens=4, temperature=0.0), prompt_token_ids=(*sequence.prompt_token_ids, *alone, 5)
    )
    fork = structs.replace(
        request("c", 1, max_tokens=4, temperature=0.0), prompt_token_ids=(*sequence.prompt_token_ids[:64], 7, 8)
    )
    later = [tokens(by_one_instance(router, load, one))[0] for one in (next_turn, fork)]
    with (
        Instance(router, "prefill-0", "b1", model=served(load)) as prefill,
        Instance(router, "decode-0", "c1", model=served(load), prefix_caching=True) as decode,
    ):
        decode.pool.data[:] = b"\xff" * len(decode.pool.data)
        hand_over(router, prefill, decode, with_names(sequence, size))
        router.wait_for_end("a")
        pulled = router.expect(Pulled)
        for one in (next_turn, fork):
            decode.send(Generate(request=with_names(one, size)))
            router.wait_for_end(one.request_id)
        # The next turn goes on from what is there; the fork would need what is behind the window, and is computed.
        starts = [next(step[name][0] for step in decode.executor.steps if name in step) for name in "bc"]
    assert tokens([router.outputs(name) for name in "abc"]) == [alone, *later]
    layout, num_blocks = decode.pool.layout, -(-70 // size)
    num_outside = (70 - window + 1) // size
    num_read = num_blocks + (num_blocks - num_outside) * layout.window_blocks.num_each
    assert (pulled.failure, pulled.num_bytes) == ("", num_read * layout.block_bytes)
    assert num_outside > 0
    assert starts == [(70 + 24 - 1) // size * size, 0]


@pytest.mark.parametrize("backend_name", ["native", "torch"])
def test_contexts_of_many_windows_in_a_pool_that_could_not_hold_all_their_layers(
    router: RouterEnd, tiny_model: Callable[..., Path], backend_name: str
) -> None:
    """Gemma 3: one layer of six sees all. Alone, over two instances and from transformers come the same tokens."""
    if backend_name == "native" and (reason := native_unavailable_reason(torch.device("cpu"), torch.float32)):
        pytest.skip(reason)
    window, size = (5, BLOCK_SIZE) if backend_name == "torch" else (20, 16)
    folder = tiny_model("gemma3_text", vocab_size=VOCAB_SIZE, num_hidden_layers=7, sliding_window=window)
    files = locate_model(str(folder))
    config = load_config(files)

    def load() -> Decoder:
        backend = select_backend(torch.device("cpu"), torch.float32, backend_name)
        return Decoder(config, load_weights(files, config, backend, dtype=DType.FLOAT32), backend)

    model = served(load)
    assert model.layout.window_blocks == WindowBlocks(window, 6)
    num_prompt, num_output = 16 * size, 2 * size
    num_blocks, in_sight = 18, model.layout.window_blocks.most_in_sight(16, size)
    num_held = num_blocks + 6 * in_sight
    assert num_held < 7 * num_blocks // 2
    sequence = with_names(request("a", num_prompt, max_tokens=num_output, temperature=0.0), size)
    twice = structs.replace(sequence, request_id=RequestId("b"))  # the first is found, as far as its window is there
    fields: dict[str, Any] = {"num_blocks": num_held, "prefix_caching": True}
    expected = greedy_answer(folder, sequence.prompt_token_ids, num_output)
    assert tokens(by_one_instance(router, load, sequence, twice, **fields)) == [expected, expected]
    with (
        Instance(router, "prefill-0", "b1", model=model, **fields) as prefill,
        Instance(router, "decode-0", "c1", model=served(load), **fields) as decode,
    ):
        hand_over(router, prefill, decode, sequence)
        router.wait_for_end("a")
    assert tokens([router.outputs("a")]) == [expected]
    assert all(start >= num_prompt for step in decode.executor.steps for start, _ in step.values())


def greedy_answer(folder: Path, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What transformers says, as far as it goes on."""
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        known = list(prompt)
        for _ in range(num_tokens):
            known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    return known[len(prompt) :]


def with_names(sequence: GenerationRequest, size: int) -> GenerationRequest:
    """The sequence with the names of its blocks, as the API gives them."""
    return structs.replace(sequence, block_hashes=hash_blocks(sequence.prompt_token_ids, size), hash_block_size=size)


def test_chunks_and_batches_do_not_change_the_answer(router: RouterEnd, load_decoder: LoadDecoder) -> None:
    sequences = [request(f"length-{length}", length, max_tokens=8, temperature=0.0) for length in LENGTHS]
    together = tokens(by_one_instance(router, load_decoder, *sequences))
    one_by_one = SchedulerSettings(max_batch_tokens=512, max_batch_size=1)
    assert tokens(by_one_instance(router, load_decoder, *sequences, settings=one_by_one)) == together


def test_a_sequence_that_was_preempted_goes_on_as_if_it_had_not_been(
    router: RouterEnd, load_decoder: LoadDecoder
) -> None:
    sequences = [request(name, 9, max_tokens=20, seed=n) for n, name in enumerate("abcd")]
    roomy = by_one_instance(router, load_decoder, *sequences)
    assert tokens(by_one_instance(router, load_decoder, *sequences, num_blocks=12)) == tokens(roomy)


def numbers(logprobs: tuple[PositionLogprobs, ...]) -> list[float]:
    return [token.logprob for position in logprobs for token in (position.chosen, *position.top)]


def ids(logprobs: tuple[PositionLogprobs, ...]) -> list[int]:
    return [token.token_id for position in logprobs for token in (position.chosen, *position.top)]


def test_logprobs_survive_the_hand_over(router: RouterEnd, load_decoder: LoadDecoder) -> None:
    sequence = request("a", 17, max_tokens=6, logprobs=3, prompt_logprobs=2)
    (alone,) = by_one_instance(router, load_decoder, sequence)
    (apart,) = by_two_instances(router, load_decoder, sequence)
    for one, other in zip(alone, apart, strict=True):
        assert ids(one.logprobs) == ids(other.logprobs)
        assert numbers(one.logprobs) == pytest.approx(numbers(other.logprobs), abs=1e-4)
        assert len(one.logprobs[0].top) == 3
        assert numbers(one.prompt_logprobs) == pytest.approx(numbers(other.prompt_logprobs), abs=1e-4)


def test_prompt_logprobs_do_not_depend_on_the_chunks(router: RouterEnd, load_decoder: LoadDecoder) -> None:
    sequence = request("a", 40, max_tokens=1, prompt_logprobs=1)
    ((chunked,),) = by_one_instance(router, load_decoder, sequence)
    whole = SchedulerSettings(max_batch_tokens=512)
    ((at_once,),) = by_one_instance(router, load_decoder, sequence, settings=whole)
    assert tuple(position.chosen.token_id for position in chunked.prompt_logprobs) == sequence.prompt_token_ids[1:]
    assert ids(chunked.prompt_logprobs) == ids(at_once.prompt_logprobs)
    assert numbers(chunked.prompt_logprobs) == pytest.approx(numbers(at_once.prompt_logprobs), abs=1e-4)


BAD = 991
"""A token whose embedding is broken in ``poisoned``."""


@pytest.fixture
def poisoned(load_decoder: LoadDecoder) -> LoadDecoder:
    def load() -> Decoder:
        decoder = load_decoder()
        decoder._weights.embeddings[BAD] = torch.nan
        return decoder

    return load


def bad_request(name: str, length: int, **changes: Any) -> GenerationRequest:
    good = request(name, length, **changes)
    return structs.replace(good, prompt_token_ids=(*good.prompt_token_ids[: length // 2], BAD, 5))


HOPELESS: dict[str, dict[str, Any]] = {
    "infinite penalty": {"repetition_penalty": 1e-300},
    "infinite bias": {"logit_bias": ((7, math.inf),)},
    "no token left": {"min_tokens": 2, "stop_token_ids": tuple(range(VOCAB_SIZE))},
}


class TestOneSequenceFails:
    """Beside others, whose answers do not change."""

    def others(self) -> list[GenerationRequest]:
        sequences = [request(f"good-{length}", length, max_tokens=12, seed=length) for length in LENGTHS]
        assert all(BAD not in sequence.prompt_token_ids for sequence in sequences)
        return sequences

    @pytest.mark.parametrize("sampling", HOPELESS.values(), ids=HOPELESS)
    def test_for_its_parameters(self, router: RouterEnd, load_decoder: LoadDecoder, sampling: dict[str, Any]) -> None:
        expected = tokens(by_one_instance(router, load_decoder, *self.others()))
        hopeless = [request(f"hopeless-{n}", 5 + n, max_tokens=4, **sampling) for n in range(5)]
        with Instance(router, "colocated-0", model=served(load_decoder)) as engine:
            engine.send(*(Generate(request=s) for pair in zip(self.others(), hopeless, strict=False) for s in pair))
            engine.send(*(Generate(request=sequence) for sequence in self.others()[len(hopeless) :]))
            for _ in hopeless:
                failed = router.expect(Failed)
                assert (failed.request_id[:8], failed.kind) == ("hopeless", FailureKind.INVALID)
                assert "leave no token to choose" in failed.message
            router.wait_for_end(*(sequence.request_id for sequence in self.others()))
            engine.wait_until_idle()
        assert tokens([router.outputs(sequence.request_id) for sequence in self.others()]) == expected

    @pytest.mark.parametrize("logprobs", [None, 1])
    def test_for_broken_weights(
        self, router: RouterEnd, load_decoder: LoadDecoder, poisoned: LoadDecoder, logprobs: int | None
    ) -> None:
        """The others get its blocks, when it has left them."""
        expected = tokens(by_one_instance(router, load_decoder, *self.others()))
        assert all(BAD not in answer for answer in expected)
        bad = [bad_request(f"bad-{n}", 30 + n, max_tokens=4, prompt_logprobs=logprobs) for n in range(5)]
        with Instance(router, "colocated-0", model=served(poisoned), num_blocks=20, prefix_caching=True) as engine:
            for sequence in bad:
                engine.send(Generate(request=sequence))
            engine.send(*(Generate(request=sequence) for sequence in self.others()))
            for _ in bad:
                failed = router.expect(Failed)
                assert (failed.request_id[:3], failed.kind) == ("bad", FailureKind.INTERNAL)
                assert "NaN or infinity" in failed.message
            router.wait_for_end(*(sequence.request_id for sequence in self.others()))
            engine.wait_until_idle()
        assert tokens([router.outputs(sequence.request_id) for sequence in self.others()]) == expected
