"""Two engine loops: the last KV blocks of a prompt are read while the prefill step still writes them."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from cluster import Instance, RouterEnd, abort, answer, continuation, fake_model, release, request
from msgspec import structs

from disagg.base.messages import Adopt, Generate, KvOffer, Offered, PartOffered, PeerLost, Pulled, Reserve
from disagg.base.request import GenerationRequest
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.scheduling.hand_over import hand_overs

PROMPT = 15
"""Tokens: one step, and four blocks, the last of which is not full."""


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_overs, "LEAST_PART_TOKENS", 8)


@pytest.fixture(params=[KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[RouterEnd, Instance, Instance]]:
    """The router's end, a prefill instance whose steps are held, and a decode instance; in the end none has a block."""
    settings = TransferSettings(kv_link=request.param)
    with ExitStack() as stack:
        router = RouterEnd()
        stack.callback(router.close)
        prefill, decode = (
            stack.enter_context(Instance(router, name, life, transfer=settings, shows_progress=True))
            for name, life in (("prefill-0", "b1"), ("decode-0", "c1"))
        )
        prefill.executor.gate.close()
        yield router, prefill, decode
    for instance in (prefill, decode):
        assert instance.audit is not None
        assert instance.audit.free == instance.audit.total


def begin(router: RouterEnd, prefill: Instance, decode: Instance, sequence: GenerationRequest) -> KvOffer:
    """Let the prefill step begin, and the decode instance read behind it; return what it was offered."""
    prefill.send(Generate(request=sequence, hand_over=True))
    part = router.expect(PartOffered).offer
    assert (part.first_block, part.num_tokens, len(part.block_ids), part.digests) == (0, PROMPT, 4, b"")
    decode.send(Reserve(request=sequence, offer=part))
    prefill.executor.gate.wait_until_held()
    return part


def finish(
    router: RouterEnd, prefill: Instance, decode: Instance, sequence: GenerationRequest, offer: KvOffer
) -> Pulled:
    """Let the decode instance go on to the end of the answer; return what it says of the hand-over."""
    decode.send(Adopt(request=continuation(sequence, router.tokens(sequence.request_id)), offer=offer))
    pulled = router.expect(Pulled)
    prefill.send(release(offer))
    router.wait(lambda: router.tokens(sequence.request_id) == answer(sequence))
    return pulled


def test_all_blocks_come_behind_the_step(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence = request("a", PROMPT)
    begin(router, prefill, decode, sequence)
    prefill.executor.gate.open()
    offer = router.expect(Offered).offer
    assert len(offer.digests) == 8 * 4
    pulled = finish(router, prefill, decode, sequence, offer)
    assert (pulled.failure, pulled.num_repeated) == ("", 0)
    assert pulled.num_bytes == 4 * decode.pool.layout.block_bytes


@pytest.mark.parametrize("kv_link", [KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
@pytest.mark.parametrize("size", [2, 8])
def test_blocks_of_another_size_come_behind_the_step_too(kv_link: KvLinkChoice, size: int) -> None:
    sequence, settings = request("a", PROMPT), TransferSettings(kv_link=kv_link)
    with ExitStack() as stack:
        router = RouterEnd()
        stack.callback(router.close)
        prefill = stack.enter_context(Instance(router, "prefill-0", "b1", transfer=settings, shows_progress=True))
        model = fake_model(block_size=size)
        decode = stack.enter_context(Instance(router, "decode-0", "c1", transfer=settings, model=model))
        prefill.executor.gate.close()
        begin(router, prefill, decode, sequence)
        prefill.executor.gate.open()
        pulled = finish(router, prefill, decode, sequence, router.expect(Offered).offer)
        num_bytes = 16 * decode.pool.layout.block_bytes // size
        assert (pulled.failure, pulled.num_repeated, pulled.num_bytes) == ("", 0, num_bytes)


def test_what_came_otherwise_is_read_again(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    """As after a fault of the link, or of whoever read before it was written."""
    router, prefill, decode = pair
    sequence = request("a", PROMPT)
    part = begin(router, prefill, decode, sequence)
    prefill.executor.gate.open()
    offer = router.expect(Offered).offer
    decode.settle()
    damaged = bytearray(offer.digests)
    damaged[8] ^= 1
    whole = structs.replace(offer, digests=bytes(damaged))
    decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=whole))
    pulled = router.expect(Pulled)
    assert f"KV block {part.block_ids[1]} of the peer came twice with another digest" in pulled.failure
    prefill.send(release(offer))
    router.wait(lambda: router.tokens("a") == answer(sequence))  # computed here


def test_nobody_wants_what_is_read_behind_a_step(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    begin(router, prefill, decode, request("a", PROMPT))
    decode.send(abort("a"))
    decode.wait_until_idle()  # though the step is still held
    prefill.send(abort("a"))
    prefill.executor.gate.open()
    prefill.wait_until_idle()


def test_a_source_that_dies_in_its_step_leaves_nothing_behind(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence = request("a", PROMPT)
    begin(router, prefill, decode, sequence)
    decode.send(PeerLost(instance=prefill.ready.instance, incarnation="b1"))
    decode.settle()
    decode.send(abort("a"), Generate(request=structs.replace(sequence, epoch=2)))
    router.wait(lambda: router.tokens("a") == answer(sequence))
    prefill.send(abort("a"))
    prefill.executor.gate.open()
    prefill.wait_until_idle()


def test_a_decode_step_does_not_wait_for_a_read_behind_a_step(pair: tuple[RouterEnd, Instance, Instance]) -> None:
    router, prefill, decode = pair
    sequence, another = request("a", PROMPT), request("b", PROMPT)
    begin(router, prefill, decode, sequence)
    decode.send(Generate(request=another))
    router.wait(lambda: router.tokens("b") == answer(another))
    prefill.executor.gate.open()
    pulled = finish(router, prefill, decode, sequence, router.expect(Offered).offer)
    assert not pulled.failure
