"""Two engine loops: KV blocks are read part by part while the prompt is still being computed, over either link."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cluster import VOCAB_SIZE, Instance, RouterEnd, abort, answer, continuation, fake_model, release, request
from fake_executor import continue_prompt

from disagg.base.messages import Adopt, Generate, MoreKv, Offered, PartOffered, PeerLost, Pulled, Reserve
from disagg.base.request import GenerationRequest
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.scheduling.hand_over import hand_overs

PROMPT = 61
"""Tokens, in steps of 16: three parts of four blocks each, and the rest of the prompt."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_overs, "LEAST_PART_TOKENS", 16)


@pytest.fixture(params=[KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[RouterEnd, Instance, Instance]]:
    """The router's end, a prefill and a decode instance, at whose end no block is held."""
    settings = TransferSettings(kv_link=request.param)
    with ExitStack() as stack:
        router = RouterEnd()
        stack.callback(router.close)
        prefill = stack.enter_context(Instance(router, "prefill-0", incarnation="b1", transfer=settings))
        decode = stack.enter_context(Instance(router, "decode-0", incarnation="c1", transfer=settings))
        yield router, prefill, decode
    for instance in (prefill, decode):
        assert instance.audit is not None
        assert instance.audit.free == instance.audit.total


def pass_parts_on(router: RouterEnd, decode: Instance, sequence: GenerationRequest, count: int) -> None:
    """Do what a router does with the first ``count`` parts."""
    for number in range(count):
        part = router.expect(PartOffered).offer
        assert (part.first_block, part.num_tokens) == (4 * number, 16 * (number + 1))
        decode.send(Reserve(request=sequence, offer=part) if number == 0 else MoreKv(offer=part))


def test_parts_and_the_rest_are_all_blocks_each_read_once(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence = request("a", PROMPT)
    prefill.send(Generate(request=sequence, hand_over=True))
    pass_parts_on(router, decode, sequence, 3)
    offer = router.expect(Offered, "prefill-0").offer
    assert len(offer.digests) == 8 * len(offer.block_ids) == 8 * 16
    decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=offer))
    pulled = router.expect(Pulled)
    assert (pulled.failure, pulled.num_bytes) == ("", 16 * decode.pool.layout.block_bytes)
    assert 0 <= pulled.overlapped_s <= pulled.duration_s
    prefill.send(release(offer))
    router.wait(lambda: router.tokens("a") == answer(sequence))


@pytest.mark.parametrize("kv_link", [KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
def test_parts_behind_a_window_are_read_without_the_layers_that_slide(kv_link: KvLinkChoice) -> None:
    """The token after 61 sees the last 10 positions, 52 to 61: blocks 13 to 15 of 16, in two layers of three."""
    settings, layers = TransferSettings(kv_link=kv_link), {"num_window_layers": 2, "window": 10}
    model = fake_model(num_layers=1, **layers)
    sequence = request("a", PROMPT)
    with ExitStack() as stack:
        router = RouterEnd()
        stack.callback(router.close)
        prefill, decode = (
            stack.enter_context(Instance(router, name, life, transfer=settings, model=model))
            for name, life in (("prefill-0", "b1"), ("decode-0", "c1"))
        )
        decode.pool.data[:] = b"\xee" * len(decode.pool.data)
        prefill.send(Generate(request=sequence, hand_over=True))
        pass_parts_on(router, decode, sequence, 3)
        offer = router.expect(Offered, "prefill-0").offer
        decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=offer))
        pulled = router.expect(Pulled)
        prefill.send(release(offer))
        router.wait_for_end("a")
        one_layer = decode.pool.layout.layer_block_bytes
    num_read = 13 * 1 + 3 * 3
    assert (len(offer.block_ids), pulled.failure, pulled.num_bytes) == (num_read, "", num_read * one_layer)
    expected = continue_prompt(sequence.prompt_token_ids, sequence.sampling.max_tokens, 3, VOCAB_SIZE, **layers)
    assert router.tokens("a") == expected


@pytest.mark.parametrize("kv_link", [KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
@pytest.mark.parametrize("sizes", [(4, 8), (8, 4), (2, 16)], ids=lambda sizes: f"{sizes[0]}-to-{sizes[1]}")
def test_parts_and_the_rest_fill_blocks_of_another_size(kv_link: KvLinkChoice, sizes: tuple[int, int]) -> None:
    theirs, ours = sizes
    settings, sequence = TransferSettings(kv_link=kv_link), request("a", PROMPT)
    with ExitStack() as stack:
        router = RouterEnd()
        stack.callback(router.close)
        prefill, decode = (
            stack.enter_context(
                Instance(router, name, life, transfer=settings, model=fake_model(block_size=size), prefix_caching=True)
            )
            for name, life, size in (("prefill-0", "b1", theirs), ("decode-0", "c1", ours))
        )
        prefill.send(Generate(request=sequence, hand_over=True))
        for number in range(3):
            part = router.expect(PartOffered).offer
            assert (part.first_block * theirs, part.num_tokens) == (16 * number, 16 * (number + 1))
            decode.send(Reserve(request=sequence, offer=part) if number == 0 else MoreKv(offer=part))
        offer = router.expect(Offered, "prefill-0").offer
        assert len(offer.digests) == 8 * len(offer.block_ids) == 8 * -(-PROMPT // theirs)
        decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=offer))
        pulled = router.expect(Pulled)
        num_pieces = -(-PROMPT // min(sizes))
        num_bytes = num_pieces * min(sizes) * decode.pool.layout.block_bytes // ours
        assert (pulled.failure, pulled.num_repeated, pulled.num_bytes) == ("", 0, num_bytes)
        prefill.send(release(offer))
        router.wait(lambda: router.tokens("a") == answer(sequence))
        another = request("b", PROMPT)
        decode.send(Generate(request=another))
        router.wait(lambda: router.tokens("b") == answer(another))
        prefill.wait_until_idle()
        decode.wait_until_idle()


def test_nobody_goes_on_with_what_was_read(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence = request("a", PROMPT, max_tokens=1)
    prefill.send(Generate(request=sequence, hand_over=True))
    pass_parts_on(router, decode, sequence, 2)
    router.wait(lambda: router.tokens("a") == answer(sequence))
    decode.send(abort("a"))
    decode.wait_until_idle()


def test_a_source_that_dies_leaves_nothing_behind(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence = request("a", PROMPT)
    prefill.send(Generate(request=sequence, hand_over=True))
    pass_parts_on(router, decode, sequence, 2)
    decode.send(PeerLost(instance=prefill.ready.instance, incarnation="b1"), abort("a"))
    another = request("b", PROMPT)
    decode.send(Generate(request=another))
    router.wait(lambda: router.tokens("b") == answer(another))
    prefill.send(release(router.expect(Offered).offer))
    prefill.wait_until_idle()
