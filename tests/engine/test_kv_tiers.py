"""Prefixes lent by one engine to another, and on disk and back, with a fake model that reads every entry."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import BLOCK_SIZE, VOCAB_SIZE, Instance, RouterEnd, abort, continuation, fake_model, request
from fake_executor import continue_prompt

from disagg.base.block_hash import hash_blocks
from disagg.base.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Medium
from disagg.base.messages import (
    Adopt,
    Generate,
    KvEvents,
    Lend,
    LoadReport,
    NotHeld,
    Offered,
    Pulled,
    Release,
    ReportBlocks,
)
from disagg.base.request import GenerationRequest


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


def named(name: str, tokens: tuple[int, ...], max_tokens: int = 6) -> GenerationRequest:
    names = hash_blocks(tokens, BLOCK_SIZE)
    return request(name, 0, max_tokens=max_tokens, prompt_token_ids=tokens, block_hashes=names)


def answer(sequence: GenerationRequest) -> list[int]:
    return continue_prompt(sequence.prompt_token_ids, sequence.sampling.max_tokens, 3, VOCAB_SIZE)


def first_turn(router: RouterEnd, engine: Instance, num_tokens: int = 18, max_tokens: int = 9) -> tuple[int, ...]:
    """Let an engine answer; return prompt and answer."""
    sequence = named("first", request("first", num_tokens).prompt_token_ids, max_tokens)
    engine.send(Generate(request=sequence))
    router.wait_for_end("first")
    return (*sequence.prompt_token_ids, *router.tokens("first"))


def lend(sequence: GenerationRequest) -> Lend:
    return Lend(request_id=sequence.request_id, epoch=sequence.epoch, block_hashes=sequence.block_hashes)


class TestLoans:
    def test_a_prefix_is_pulled_from_where_it_is_and_the_rest_computed(self, router: RouterEnd) -> None:
        with (
            Instance(router, "decode-0", incarnation="d1", prefix_caching=True) as decode,
            Instance(router, "prefill-0", incarnation="e1", prefix_caching=True) as prefill,
        ):
            said = first_turn(router, decode)
            # 27 tokens, 26 of them computed: six full blocks.
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(lend(second))
            offer = router.expect(Offered, "decode-0").offer
            assert offer.num_tokens == 24
            prefill.send(Generate(request=second, prefix=offer))
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            assert router.outputs("second")[0].num_cached_tokens == 24
            assert prefill.executor.steps[0] == {"second": (24, 7)}
            assert router.expect(Pulled).num_bytes == 6 * decode.pool.layout.block_bytes
            decode.send(Release(request_id=second.request_id, epoch=second.epoch))
            decode.wait_until_idle()
            prefill.wait_until_idle()

    def test_only_what_is_missing_travels_both_ways(self, router: RouterEnd) -> None:
        """Turn two: the answer goes from decode to prefill, and of what prefill computes only the new blocks back."""
        with (
            Instance(router, "decode-0", incarnation="d1", prefix_caching=True) as decode,
            Instance(router, "prefill-0", incarnation="e1", prefix_caching=True) as prefill,
        ):
            block_bytes = decode.pool.layout.block_bytes
            first = named("first", request("first", 18).prompt_token_ids, max_tokens=9)
            prefill.send(Generate(request=first, hand_over=True))
            offer = router.expect(Offered, "prefill-0").offer
            decode.send(Adopt(request=continuation(first, router.tokens("first")), offer=offer))
            router.wait_for_end("first")
            assert router.expect(Pulled).num_bytes == 5 * block_bytes
            prefill.send(Release(request_id=first.request_id, epoch=first.epoch))

            second = named("second", (*first.prompt_token_ids, *router.tokens("first"), 1, 2, 3, 4))
            decode.send(lend(second))
            loan = router.expect(Offered, "decode-0").offer
            prefill.send(Generate(request=second, hand_over=True, prefix=loan))
            offer = router.expect(Offered, "prefill-0").offer
            decode.send(Release(request_id=second.request_id, epoch=second.epoch))
            # Prefill has the prompt's four full blocks: two of the answer come. 24 of 31 tokens are with decode.
            assert router.expect(Pulled, "prefill-0").num_bytes == 2 * block_bytes
            decode.send(Adopt(request=continuation(second, router.tokens("second")), offer=offer))
            router.wait_for_end("second")
            assert router.expect(Pulled, "decode-0").num_bytes == 2 * block_bytes
            assert router.tokens("second") == answer(second)

    def test_of_layers_with_a_window_only_what_is_in_sight_and_missing_travels(self, router: RouterEnd) -> None:
        """One layer of three sees all, two see 10 tokens, and are in two blocks more for each that they see."""
        layers = {"num_window_layers": 2, "window": 10}
        model = fake_model(num_layers=1, **layers)

        def said(sequence: GenerationRequest) -> list[int]:
            return continue_prompt(
                sequence.prompt_token_ids, sequence.sampling.max_tokens, 3, VOCAB_SIZE, num_window_layers=2, window=10
            )

        with (
            Instance(router, "decode-0", incarnation="d1", prefix_caching=True, model=model) as decode,
            Instance(router, "prefill-0", incarnation="e1", prefix_caching=True, model=model) as prefill,
        ):
            block_bytes = decode.pool.layout.block_bytes
            first = named("first", request("first", 18).prompt_token_ids, max_tokens=9)
            prefill.send(Generate(request=first, hand_over=True))
            offer = router.expect(Offered, "prefill-0").offer
            decode.send(Adopt(request=continuation(first, router.tokens("first")), offer=offer))
            router.wait_for_end("first")
            assert router.tokens("first") == said(first)
            # The token after 18 sees positions 9 to 18: blocks 2 to 4 of five.
            assert router.expect(Pulled).num_bytes == (5 + 3 * 2) * block_bytes
            prefill.send(Release(request_id=first.request_id, epoch=first.epoch))

            second = named("second", (*first.prompt_token_ids, *router.tokens("first"), 1, 2, 3, 4))
            decode.send(lend(second))
            loan = router.expect(Offered, "decode-0").offer
            assert (loan.num_tokens, len(loan.block_ids)) == (24, 6 + 3 * 2)
            prefill.send(Generate(request=second, hand_over=True, prefix=loan))
            offer = router.expect(Offered, "prefill-0").offer
            decode.send(Release(request_id=second.request_id, epoch=second.epoch))
            # Four blocks are here, with what is beside them.
            assert router.expect(Pulled, "prefill-0").num_bytes == (2 + 2 * 2) * block_bytes
            decode.send(Adopt(request=continuation(second, router.tokens("second")), offer=offer))
            router.wait_for_end("second")
            assert router.expect(Pulled, "decode-0").num_bytes == (2 + 2 * 2) * block_bytes
            assert router.tokens("second") == said(second)
            prefill.send(Release(request_id=second.request_id, epoch=second.epoch))
            prefill.wait_until_idle()
            decode.wait_until_idle()

    def test_nothing_is_lent_that_is_not_there(self, router: RouterEnd) -> None:
        with Instance(router, "decode-0", prefix_caching=True) as decode:
            decode.send(lend(named("second", (1, 2, 3, 4, 5))))
            assert router.expect(NotHeld).request_id == "second"

    def test_a_loan_that_was_given_up_leaves_nothing_behind(self, router: RouterEnd) -> None:
        with Instance(router, "decode-0", prefix_caching=True) as decode:
            second = named("second", (*first_turn(router, decode), 1))
            decode.send(lend(second), lend(second), Release(request_id=second.request_id, epoch=second.epoch))
            router.expect(Offered)
            decode.wait_until_idle()

    def test_a_pull_that_fails_is_computed(self, router: RouterEnd) -> None:
        with Instance(router, "prefill-0", incarnation="e1", prefix_caching=True) as prefill:
            with Instance(router, "decode-0", incarnation="d1", prefix_caching=True) as decode:
                second = named("second", (*first_turn(router, decode), 1, 2, 3, 4))
                decode.send(lend(second))
                offer = router.expect(Offered, "decode-0").offer
            prefill.send(Generate(request=second, prefix=offer))  # its pool is gone
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            assert router.outputs("second")[0].num_cached_tokens == 0
            assert router.expect(Pulled).failure
            prefill.wait_until_idle()


class TestEvents:
    def test_blocks_are_told_as_they_fill_and_anew_when_asked(self, router: RouterEnd) -> None:
        with Instance(router, "decode-0", prefix_caching=True) as decode:
            said = first_turn(router, decode)
            names = hash_blocks(said[:24], BLOCK_SIZE)
            router.wait(lambda: names[-1] in stored(router))
            assert stored(router) == list(names)
            assert [message.number for message in router.all(KvEvents)] == [0, 1, 2]
            decode.send(ReportBlocks())
            router.wait(lambda: len(router.all(KvEvents)) == 4)
            cleared, all_blocks = router.all(KvEvents)[-1].events
            assert cleared == AllBlocksCleared()
            assert isinstance(all_blocks, BlockStored)
            assert set(all_blocks.block_hashes) == set(names)

    def test_tokens_come_with_the_names_where_somebody_publishes_them(self, router: RouterEnd) -> None:
        with Instance(router, "decode-0", prefix_caching=True, tells_tokens=True) as decode:
            said = first_turn(router, decode)
            router.wait(lambda: len(stored(router)) == 6)
        tokens = [token for message in router.all(KvEvents) for event in message.events for token in event.token_ids]
        assert tokens == list(said[:24])


def stored(router: RouterEnd, medium: Medium = Medium.GPU) -> list[bytes]:
    return [
        name
        for message in router.all(KvEvents)
        for event in message.events
        if isinstance(event, BlockStored) and event.medium is medium
        for name in event.block_hashes
    ]


def removed(router: RouterEnd, medium: Medium) -> list[bytes]:
    return [
        name
        for message in router.all(KvEvents)
        for event in message.events
        if isinstance(event, BlockRemoved) and event.medium is medium
        for name in event.block_hashes
    ]


def first_life(router: RouterEnd, folder: Path) -> tuple[int, ...]:
    """Let an engine answer, write its six blocks and end; return prompt and answer."""
    with Instance(router, "decode-0", incarnation="d1", prefix_caching=True, disk_folder=folder) as decode:
        said = first_turn(router, decode)
        router.wait(lambda: len(stored(router, Medium.DISK)) == 6)
    return said


class TestHostMemory:
    """The fake device computes in the pool, so its host memory is a tier like that of any device."""

    def evicted(self, router: RouterEnd, engine: Instance, *media: Medium) -> tuple[int, ...]:
        """Let an engine answer, keep that in these media, and let others have its pool."""
        said = first_turn(router, engine)
        router.wait(lambda: all(len(stored(router, medium)) == 6 for medium in media))
        for number in range(4):
            name = f"other-{number}"
            engine.send(Generate(request=named(name, tuple(range(number + 1, number + 40)))))
            router.wait_for_end(name)
        engine.wait_until_idle()
        return said

    def test_the_next_turn_comes_from_host_memory_when_others_have_had_the_pool(self, router: RouterEnd) -> None:
        with Instance(router, "decode-0", prefix_caching=True, max_host_blocks=64, num_blocks=16) as decode:
            said = self.evicted(router, decode, Medium.CPU)
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            assert router.outputs("second")[0].num_cached_tokens == 24
            decode.wait_until_idle()
            load = router.all(LoadReport, "decode-0")[-1].load
            assert (load.num_prefix_from_host_total, load.num_prefix_loaded_total) == (24, 0)

    def test_what_host_memory_has_no_room_for_comes_from_disk(self, router: RouterEnd, tmp_path: Path) -> None:
        with Instance(
            router,
            "decode-0",
            prefix_caching=True,
            max_host_blocks=6,
            max_disk_blocks=200,
            disk_folder=tmp_path,
            num_blocks=16,
        ) as decode:
            said = self.evicted(router, decode, Medium.CPU, Medium.DISK)
            router.wait(lambda: hash_blocks(said, BLOCK_SIZE)[0] in removed(router, Medium.CPU))
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            decode.wait_until_idle()
            load = router.all(LoadReport, "decode-0")[-1].load
            assert load.num_prefix_from_host_total + load.num_prefix_loaded_total == 24
            assert load.num_prefix_loaded_total >= BLOCK_SIZE
            assert 0 < load.blocks_on_host <= 6


class TestDisk:
    def test_the_next_turn_is_answered_from_disk_after_a_restart(self, router: RouterEnd, tmp_path: Path) -> None:
        said = first_life(router, tmp_path)
        with Instance(router, "decode-0", incarnation="d2", prefix_caching=True, disk_folder=tmp_path) as decode:
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            assert router.outputs("second")[0].num_cached_tokens == 24
            assert decode.executor.steps[0] == {"second": (24, 7)}
            decode.wait_until_idle()

    def test_a_damaged_block_is_computed_again(self, router: RouterEnd, tmp_path: Path) -> None:
        said = first_life(router, tmp_path)
        third = hash_blocks(said, BLOCK_SIZE)[2]
        (path,) = tmp_path.glob(f"*/decode-0/*/{third.hex()}.kv")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with Instance(router, "decode-0", incarnation="d2", prefix_caching=True, disk_folder=tmp_path) as decode:
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.tokens("second") == answer(second)
            assert not path.exists() or third in stored(router, Medium.DISK)
            decode.wait_until_idle()

    def test_the_disk_is_bounded(self, router: RouterEnd, tmp_path: Path) -> None:
        with Instance(
            router, "decode-0", prefix_caching=True, disk_folder=tmp_path, max_disk_blocks=4, num_blocks=24
        ) as decode:
            for number in range(5):
                name = f"r{number}"
                decode.send(Generate(request=named(name, request(name, 20 + number).prompt_token_ids)))
                router.wait_for_end(name)
                decode.wait_until_idle()
        assert 0 < len(list(tmp_path.glob("*/decode-0/*/*.kv"))) <= 4

    def test_a_cancelled_read_frees_its_blocks(self, router: RouterEnd, tmp_path: Path) -> None:
        said = first_life(router, tmp_path)
        with Instance(router, "decode-0", incarnation="d2", prefix_caching=True, disk_folder=tmp_path) as decode:
            second = named("second", (*said, 1, 2, 3, 4))
            decode.send(Generate(request=second), abort("second"))
            decode.wait_until_idle()
