"""Bytes that are wrong when they arrive, on every link: found before the first token, and never a wrong token."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import VOCAB_SIZE, Instance, RouterEnd, continuation, request
from fake_executor import continue_prompt
from msgspec import structs

from disagg.base.messages import Adopt, Generate, KvOffer, Offered, Pulled
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings

sys.path.insert(0, str(Path(__file__).parent.parent / "transfer"))
from relay import Relay, flip, once

PROMPT_TOKENS = 50
SEQUENCE = request("a", PROMPT_TOKENS)
ANSWER = continue_prompt(SEQUENCE.prompt_token_ids, SEQUENCE.sampling.max_tokens, 3, VOCAB_SIZE, 1)


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


def offer_of(router: RouterEnd, prefill: Instance) -> KvOffer:
    prefill.send(Generate(request=SEQUENCE, hand_over=True))
    return router.expect(Offered).offer


def adopt(router: RouterEnd, decode: Instance, offer: KvOffer) -> Pulled:
    """Let the decode instance go on to the end."""
    decode.send(Adopt(request=continuation(SEQUENCE, router.tokens("a")), offer=offer))
    router.wait_for_end("a")
    decode.wait_until_idle()
    return router.expect(Pulled)


@pytest.mark.parametrize("kv_link", [KvLinkChoice.SHM, KvLinkChoice.TCP], ids=lambda link: link.value)
@pytest.mark.parametrize("place", [(0, 0), (1, 3), (2, -1)], ids=["first", "middle", "last"])
def test_blocks_that_changed_after_they_were_offered_are_computed_again(
    router: RouterEnd, kv_link: KvLinkChoice, place: tuple[int, int]
) -> None:
    settings = TransferSettings(kv_link=kv_link)
    with (
        Instance(router, "prefill-0", incarnation="b1", transfer=settings) as prefill,
        Instance(router, "decode-0", incarnation="c1", transfer=settings) as decode,
    ):
        offer = offer_of(router, prefill)
        layer, index = place
        prefill.pool.blocks[layer, offer.block_ids[index], 0] ^= 1
        pulled = adopt(router, decode, offer)
        assert "twice with another digest" in pulled.failure
        assert (pulled.num_bytes, pulled.num_repeated) == (0, 1)
        assert router.tokens("a") == ANSWER


def test_a_block_that_a_network_damaged_is_pulled_again_alone(router: RouterEnd) -> None:
    settings = TransferSettings(kv_link=KvLinkChoice.TCP)
    with (
        Instance(router, "prefill-0", incarnation="b1", transfer=settings) as prefill,
        Instance(router, "decode-0", incarnation="c1", transfer=settings) as decode,
    ):
        offer = offer_of(router, prefill)
        num_bytes = len(offer.block_ids) * prefill.pool.layout.block_bytes
        with Relay(offer.pool, once(flip(num_bytes // 2), num_bytes)) as relay:
            pulled = adopt(router, decode, structs.replace(offer, pool=relay.address))
        assert (pulled.failure, pulled.num_repeated, pulled.num_bytes) == ("", 1, num_bytes)
        assert router.tokens("a") == ANSWER


@pytest.mark.parametrize("position", [5, 60, 500, 900])
def test_a_network_that_always_damages_costs_time_but_no_token(router: RouterEnd, position: int) -> None:
    """The first bytes are the greeting and the answer, the later ones blocks."""
    settings = TransferSettings(kv_link=KvLinkChoice.TCP)
    with (
        Instance(router, "prefill-0", incarnation="b1", transfer=settings) as prefill,
        Instance(router, "decode-0", incarnation="c1", transfer=settings) as decode,
    ):
        offer = offer_of(router, prefill)
        with Relay(offer.pool, flip(position)) as relay:
            pulled = adopt(router, decode, structs.replace(offer, pool=relay.address))
        assert router.tokens("a") == ANSWER
        assert pulled.failure or pulled.num_repeated == 1


def test_without_digests_nothing_is_checked(router: RouterEnd) -> None:
    settings = TransferSettings(kv_digests=False)
    with (
        Instance(router, "prefill-0", incarnation="b1", transfer=settings) as prefill,
        Instance(router, "decode-0", incarnation="c1", transfer=settings) as decode,
    ):
        offer = offer_of(router, prefill)
        assert offer.digests == b""
        prefill.pool.blocks[0, offer.block_ids[0], 0] += 1
        assert adopt(router, decode, offer).failure == ""
        assert router.tokens("a") != ANSWER
