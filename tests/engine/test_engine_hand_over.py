"""Two engine loops with a fake model: the hand-over from prefill to decode, and what can go wrong on the way."""

import random
import threading
from collections.abc import Iterator

import pytest
from cluster import (
    BLOCK_SIZE,
    VOCAB_SIZE,
    Instance,
    RouterEnd,
    abort,
    continuation,
    fake_model,
    hand_over,
    release,
    request,
)
from fake_executor import continue_prompt
from msgspec import structs

from disagg.base.block_hash import hash_blocks
from disagg.base.config import SchedulerSettings
from disagg.base.ids import InstanceId
from disagg.base.messages import (
    Adopt,
    Failed,
    Generate,
    LoadReport,
    Offered,
    PeerLost,
    Pulled,
    Release,
    StepOutput,
)
from disagg.base.request import GenerationRequest
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


@pytest.fixture
def kv_link() -> KvLinkChoice:
    return KvLinkChoice.AUTO


@pytest.fixture
def prefill(router: RouterEnd, kv_link: KvLinkChoice) -> Iterator[Instance]:
    with Instance(router, "prefill-0", incarnation="b1", transfer=TransferSettings(kv_link=kv_link)) as instance:
        yield instance


@pytest.fixture
def decode(router: RouterEnd, kv_link: KvLinkChoice) -> Iterator[Instance]:
    settings = TransferSettings(kv_link=kv_link)
    with Instance(router, "decode-0", incarnation="c1", num_blocks=40, transfer=settings) as instance:
        yield instance
    assert instance.audit is not None
    assert instance.audit.free + instance.audit.cached == instance.audit.total


def answer(sequence: GenerationRequest) -> list[int]:
    count = sequence.sampling.max_tokens
    return continue_prompt(sequence.prompt_token_ids, count, 3, VOCAB_SIZE, sequence.sampling.seed)


class TestHandOver:
    @pytest.fixture(params=[KvLinkChoice.SHM, KvLinkChoice.TCP, KvLinkChoice.NIXL], ids=lambda link: link.value)
    def kv_link(self, request: pytest.FixtureRequest) -> KvLinkChoice:
        """Every test of this class runs over every link."""
        if request.param is KvLinkChoice.NIXL:
            pytest.importorskip("nixl_cu12", reason="NIXL is not installed: pip install 'disagg[nixl]'")
        return KvLinkChoice(request.param)

    @pytest.mark.parametrize("num_tokens", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 16, 17, 50])
    def test_the_answer_is_the_one_of_a_single_instance(
        self, router: RouterEnd, prefill: Instance, decode: Instance, num_tokens: int, kv_link: KvLinkChoice
    ) -> None:
        sequence = request("a", num_tokens)
        offer = hand_over(router, prefill, decode, sequence)
        assert (offer.source, offer.incarnation, offer.num_tokens) == ("prefill-0", "b1", num_tokens)
        router.wait_for_end("a")
        assert router.tokens("a") == answer(sequence)
        pulled = router.expect(Pulled)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        assert (pulled.source, pulled.failure, pulled.link) == ("prefill-0", "", kv_link.value)
        assert pulled.num_bytes == num_blocks * decode.pool.layout.block_bytes
        assert decode.executor.steps[0] == {"a": (num_tokens, 1)}
        prefill.send(release(offer))
        prefill.wait_until_idle()
        decode.wait_until_idle()

    def test_the_first_token_leaves_before_the_offer(self, router: RouterEnd, prefill: Instance) -> None:
        prefill.send(Generate(request=request("a", 9), hand_over=True))
        router.wait(lambda: bool(router.all(Offered)))
        kinds = [type(message) for _, message in router.received if not isinstance(message, LoadReport)]
        assert kinds == [StepOutput, Offered]
        assert prefill.executor.published == [router.all(Offered)[0].offer.block_ids]

    def test_a_sequence_that_ends_with_its_first_token_is_not_offered(
        self, router: RouterEnd, prefill: Instance
    ) -> None:
        prefill.send(Generate(request=request("a", 9, max_tokens=1), hand_over=True))
        router.wait_for_end("a")
        prefill.wait_until_idle()
        assert router.all(Offered) == []

    def test_stamps_of_the_decode_instance_tell_the_pull(
        self, router: RouterEnd, prefill: Instance, decode: Instance
    ) -> None:
        hand_over(router, prefill, decode, request("a", 9))
        router.wait_for_end("a")
        stamps = router.outputs("a")[1].stamps
        assert stamps is not None
        in_order = [
            stamps.received_s,
            stamps.pull_started_s,
            stamps.pulled_s,
            stamps.scheduled_s,
            stamps.first_step_done_s,
        ]
        assert in_order == sorted(in_order)
        assert stamps.received_s > 0

    def test_blocks_already_here_are_not_pulled_again(self, router: RouterEnd, prefill: Instance) -> None:
        prompt = request("same", 12).prompt_token_ids
        settings = prefill.transfer
        with Instance(router, "decode-1", incarnation="c2", prefix_caching=True, transfer=settings) as decode:
            for name in ("same", "again"):
                hashes = hash_blocks(prompt, BLOCK_SIZE)
                sequence = structs.replace(
                    request(name, 1), prompt_token_ids=prompt, block_hashes=hashes, hash_block_size=BLOCK_SIZE
                )
                hand_over(router, prefill, decode, sequence)
                router.wait_for_end(name)
            first, second = router.expect(Pulled), router.expect(Pulled)
            assert first.num_bytes == 3 * decode.pool.layout.block_bytes
            assert (second.num_bytes, second.failure) == (0, "")
            assert router.tokens("same") == router.tokens("again") == answer(request("same", 12))

    def test_many_at_once(self, router: RouterEnd, prefill: Instance, decode: Instance) -> None:
        sequences = [request(f"s{n}", 1 + 3 * n, max_tokens=8, seed=n) for n in range(12)]
        prefill.send(*(Generate(request=sequence, hand_over=True) for sequence in sequences))
        by_name = {sequence.request_id: sequence for sequence in sequences}
        for _ in sequences:
            offer = router.expect(Offered).offer
            adopted = continuation(by_name[offer.request_id], router.tokens(offer.request_id))
            decode.send(Adopt(request=adopted, offer=offer))
        router.wait_for_end(*by_name)
        assert [router.tokens(s.request_id) for s in sequences] == [answer(s) for s in sequences]
        for _ in sequences:
            pulled = router.expect(Pulled)
            assert pulled.failure == ""
            prefill.send(Release(request_id=pulled.request_id, epoch=pulled.epoch))
        prefill.wait_until_idle()
        decode.wait_until_idle()


class TestHandOverFaults:
    def test_a_source_gone_before_the_pull_costs_time_but_no_token(self, router: RouterEnd, decode: Instance) -> None:
        sequence = request("a", 9)
        with Instance(router, "prefill-1", incarnation="b2") as source:
            source.send(Generate(request=sequence, hand_over=True))
            offer = router.expect(Offered).offer
        decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=offer))
        router.wait_for_end("a")
        assert router.tokens("a") == answer(sequence)
        pulled = router.expect(Pulled)
        assert pulled.num_bytes == 0
        assert "peer" in pulled.failure
        assert decode.executor.steps[0] == {"a": (0, 10)}
        decode.wait_until_idle()

    def test_a_source_lost_while_the_pull_waits_for_room(self, router: RouterEnd, prefill: Instance) -> None:
        alone = SchedulerSettings(max_batch_tokens=16, max_batch_size=1)
        with Instance(router, "decode-1", incarnation="c2", settings=alone) as decode:
            decode.executor.gate.close()
            decode.send(Generate(request=request("b", 3, max_tokens=80)))
            decode.settle()
            sequence = request("a", 9)
            hand_over(router, prefill, decode, sequence)
            decode.send(PeerLost(instance=InstanceId("prefill-0"), incarnation="b1"))
            decode.settle()
            decode.executor.gate.open()
            router.wait_for_end("a", "b")
            assert router.tokens("a") == answer(sequence)
            assert router.expect(Pulled).failure == "its source has died"
            decode.wait_until_idle()

    def test_another_layout_is_refused_by_name_and_recomputed(self, router: RouterEnd, prefill: Instance) -> None:
        sequence = request("a", 9)
        with Instance(router, "decode-1", incarnation="c2", model=fake_model(head_dim=8)) as decode:
            hand_over(router, prefill, decode, sequence)
            router.wait_for_end("a")
            assert "differ in head_dim" in router.expect(Pulled).failure
            assert router.tokens("a") == answer(sequence)

    def test_an_expired_lease_is_not_read(self, router: RouterEnd, decode: Instance) -> None:
        sequence = request("a", 9)
        with Instance(router, "prefill-1", incarnation="b2") as source:
            source.send(Generate(request=sequence, hand_over=True))
            offer = router.expect(Offered).offer
            late = structs.replace(offer, lease_s=0.0)  # the router had no decode instance for as long as the lease
            decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=late))
            router.wait_for_end("a")
            assert router.tokens("a") == answer(sequence)
            assert "expired" in router.expect(Pulled).failure

    def test_abort_while_the_pull_runs_frees_its_blocks_only_when_it_ended(
        self, router: RouterEnd, prefill: Instance, decode: Instance
    ) -> None:
        held = HeldThread(decode)
        hand_over(router, prefill, decode, request("a", 9))
        router.wait(lambda: any(report.load.blocks_filling for report in router.all(LoadReport, "decode-0")))
        decode.send(abort("a"))
        assert router.expect(Pulled).failure == "aborted"
        router.wait(lambda: router.all(LoadReport, "decode-0")[-1].load.blocks_quarantined == 3)
        held.let_go()
        decode.wait_until_idle()
        assert len(router.tokens("a")) == 1

    def test_an_offer_of_another_sequence_is_given_back_and_released(
        self, router: RouterEnd, prefill: Instance, decode: Instance
    ) -> None:
        prefill.send(Generate(request=request("a", 9), hand_over=True))
        offer = router.expect(Offered).offer
        decode.send(Adopt(request=continuation(request("b", 9), (1,)), offer=offer))
        assert "does not belong" in router.expect(Failed).message
        assert router.expect(Pulled).failure == "the sequence was refused"

    def test_a_restarted_peer_is_not_taken_for_the_old_one(self, router: RouterEnd, decode: Instance) -> None:
        for incarnation, name in (("b2", "a"), ("b3", "b")):
            sequence = request(name, 9)
            with Instance(router, "prefill-1", incarnation=incarnation) as source:
                hand_over(router, source, decode, sequence)
                router.wait_for_end(name)
                assert router.expect(Pulled).failure == ""
            decode.send(PeerLost(instance=InstanceId("prefill-1"), incarnation=incarnation))
            assert router.tokens(name) == answer(sequence)


class HeldThread:
    """Keeps an instance's pulls from running until ``let_go``."""

    def __init__(self, instance: Instance) -> None:
        self._event = threading.Event()
        instance.pull_thread.submit(self._event.wait, 30.0)

    def let_go(self) -> None:
        self._event.set()


class TestConservation:
    @pytest.mark.parametrize("seed", range(4))
    def test_random_traffic_and_aborts_leave_no_block_behind(
        self, router: RouterEnd, prefill: Instance, seed: int
    ) -> None:
        """Aborts come at any moment, to both sides; whoever is not aborted gets the whole answer."""
        draw = random.Random(seed)
        sequences = {f"s{n}": request(f"s{n}", draw.randint(1, 40), draw.randint(2, 20), seed=n) for n in range(24)}
        aborted = set(draw.sample(sorted(sequences), 8))
        with Instance(router, "decode-1", incarnation="c2", num_blocks=20, prefix_caching=True) as decode:
            prefill.send(*(Generate(request=sequence, hand_over=True) for sequence in sequences.values()))
            num_handled = 0
            while not all(name in aborted or is_complete(router, name) for name in sequences):
                router.wait(lambda: len(router.news) > num_handled)  # noqa: B023
                for _, message in router.news[num_handled:]:
                    num_handled += 1
                    if isinstance(message, Offered):
                        first = router.tokens(message.offer.request_id)
                        adopted = continuation(sequences[message.offer.request_id], first)
                        decode.send(Adopt(request=adopted, offer=message.offer))
                    elif isinstance(message, Pulled):
                        prefill.send(Release(request_id=message.request_id, epoch=message.epoch))
                if aborted and draw.random() < 0.3:
                    for instance in (prefill, decode):
                        instance.send(abort(draw.choice(sorted(aborted))))
            for name in aborted:
                prefill.send(abort(name))
                decode.send(abort(name))
            decode.wait_until_idle()
            prefill.wait_until_idle()
        for name in set(sequences) - aborted:
            assert router.tokens(name) == answer(sequences[name])


def is_complete(router: RouterEnd, name: str) -> bool:
    outputs = router.outputs(name)
    return bool(outputs) and outputs[-1].finish_reason is not None
