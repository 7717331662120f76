"""The engine loop with a fake model: what goes in and out of one instance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import (
    BLOCK_SIZE,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    Instance,
    RouterEnd,
    abort,
    continuation,
    release,
    request,
)
from fake_executor import continue_prompt

from disagg.base.block_hash import first_link, hash_blocks
from disagg.base.config import SchedulerSettings
from disagg.base.errors import InternalError
from disagg.base.messages import (
    Failed,
    FailureKind,
    Generate,
    LoadReport,
    Offered,
    Release,
    StepOutput,
    Stop,
)
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason
from disagg.scheduling.event_log import parse_log, replay


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


@pytest.fixture
def engine(router: RouterEnd) -> Iterator[Instance]:
    with Instance(router, "colocated-0") as instance:
        yield instance
    assert instance.audit is not None
    assert instance.audit.free + instance.audit.cached == instance.audit.total


def answer(sequence: GenerationRequest, num_tokens: int | None = None) -> list[int]:
    count = sequence.sampling.max_tokens if num_tokens is None else num_tokens
    return continue_prompt(sequence.prompt_token_ids, count, 3, VOCAB_SIZE, sequence.sampling.seed)


class TestGenerate:
    @pytest.mark.parametrize("num_tokens", [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 16, 17, 50])
    def test_a_prompt_is_answered_token_by_token(self, router: RouterEnd, engine: Instance, num_tokens: int) -> None:
        sequence = request("a", num_tokens)
        engine.send(Generate(request=sequence))
        router.wait_for_end("a")
        assert router.tokens("a") == answer(sequence)
        assert [output.finish_reason for output in router.outputs("a")] == [None] * 5 + [FinishReason.LENGTH]
        engine.wait_until_idle()

    def test_all_sequences_of_a_step_share_one_message(self, router: RouterEnd, engine: Instance) -> None:
        sequences = [request(name, 3, max_tokens=20) for name in ("a", "b", "c")]
        engine.executor.gate.close()
        engine.send(*(Generate(request=sequence) for sequence in sequences))
        engine.settle()
        engine.executor.gate.open()
        router.wait_for_end("a", "b", "c")
        assert [router.tokens(s.request_id) for s in sequences] == [answer(s) for s in sequences]
        names = [{output.request_id for output in message.outputs} for message in router.all(StepOutput)]
        assert names == [set(step) for step in engine.executor.steps]
        assert {"a", "b", "c"} in names

    def test_sequences_that_do_not_fit_together_are_recomputed_and_unharmed(self, router: RouterEnd) -> None:
        sequences = [request(name, 9, max_tokens=20, seed=n) for n, name in enumerate("abcd")]
        with Instance(router, "small", num_blocks=12) as engine:
            engine.send(*(Generate(request=sequence) for sequence in sequences))
            router.wait_for_end("a", "b", "c", "d")
            assert [router.tokens(s.request_id) for s in sequences] == [answer(s) for s in sequences]
            engine.wait_until_idle()
            assert router.all(LoadReport)[-1].load.num_preemptions_total > 0

    def test_several_steps_in_flight_change_nothing_but_the_order(self, router: RouterEnd) -> None:
        settings = SchedulerSettings(max_batch_tokens=16, max_batch_size=3, max_steps_in_flight=2)
        sequences = [request(f"s{n}", 1 + 7 * n, max_tokens=9, seed=n) for n in range(7)]
        with Instance(router, "deep", settings=settings) as engine:
            engine.send(*(Generate(request=sequence) for sequence in sequences))
            router.wait_for_end(*(sequence.request_id for sequence in sequences))
            engine.wait_until_idle()
        assert [router.tokens(s.request_id) for s in sequences] == [answer(s) for s in sequences]

    def test_stage_stamps_come_with_the_first_output_and_are_in_order(
        self, router: RouterEnd, engine: Instance
    ) -> None:
        engine.send(Generate(request=request("a", 5, max_tokens=2)))
        router.wait_for_end("a")
        first, second = router.outputs("a")
        assert first.stamps is not None
        assert 0 < first.stamps.received_s <= first.stamps.scheduled_s <= first.stamps.first_step_done_s
        assert (first.stamps.pull_started_s, first.stamps.pulled_s) == (0.0, 0.0)
        assert second.stamps is None

    def test_a_prefix_seen_before_is_not_computed_again(self, router: RouterEnd) -> None:
        prompt = request("same", 14).prompt_token_ids
        hashes = hash_blocks(prompt, BLOCK_SIZE)
        with Instance(router, "caching", prefix_caching=True) as engine:
            for name in ("same", "again"):
                engine.send(Generate(request=request(name, 14, max_tokens=1, block_hashes=hashes)))
                router.wait_for_end(name)
            assert router.outputs("same")[0].num_cached_tokens == 0
            assert router.outputs("again")[0].num_cached_tokens == 12
            assert engine.executor.steps == [{"same": (0, 14)}, {"again": (12, 2)}]

    def test_an_answer_is_a_prefix_of_the_next_turn(self, router: RouterEnd) -> None:
        prompt = request("first", 10).prompt_token_ids
        first = request("first", 10, max_tokens=11, block_hashes=hash_blocks(prompt, BLOCK_SIZE))
        with Instance(router, "caching", prefix_caching=True) as engine:
            engine.send(Generate(request=first))
            router.wait_for_end("first")
            conversation = (*first.prompt_token_ids, *router.tokens("first"), 5, 6, 7)
            names = hash_blocks(conversation, BLOCK_SIZE)
            second = request("second", 24, max_tokens=11, prompt_token_ids=conversation, block_hashes=names)
            engine.send(Generate(request=second))
            router.wait_for_end("second")
            # 21 tokens are known after the first answer, 20 of them computed: five full blocks.
            assert router.outputs("second")[0].num_cached_tokens == 20
            assert engine.executor.steps[-11] == {"second": (20, 4)}
            assert router.tokens("second") == answer(second)

    @pytest.mark.parametrize(("hash_size", "num_cached"), [(2, 20), (1, 20), (8, 0), (3, 0)])
    def test_names_of_blocks_of_another_size(self, router: RouterEnd, hash_size: int, num_cached: int) -> None:
        """Those of parts of a block name it; those of larger blocks, or of no parts of one, name none."""
        named = {"hash_block_size": hash_size}
        prompt = request("first", 10).prompt_token_ids
        first = request("first", 10, max_tokens=11, block_hashes=hash_blocks(prompt, hash_size), **named)
        with Instance(router, "caching", prefix_caching=True) as engine:
            engine.send(Generate(request=first))
            router.wait_for_end("first")
            conversation = (*first.prompt_token_ids, *router.tokens("first"), 5, 6, 7)
            names = hash_blocks(conversation, hash_size)
            second = request("second", 24, prompt_token_ids=conversation, block_hashes=names, **named)
            engine.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.outputs("second")[0].num_cached_tokens == num_cached
            assert router.tokens("second") == answer(second)

    @pytest.mark.parametrize(("salt", "num_cached"), [("tenant", 4), ("other", 0)])
    def test_a_short_prompt_and_its_answer_are_found_by_the_same_salt_alone(
        self, router: RouterEnd, salt: str, num_cached: int
    ) -> None:
        first = request("first", 2, max_tokens=4, cache_salt="tenant")
        with Instance(router, "caching", prefix_caching=True) as engine:
            engine.send(Generate(request=first))
            router.wait_for_end("first")
            conversation = (*first.prompt_token_ids, *router.tokens("first"))
            names = hash_blocks(conversation, BLOCK_SIZE, first_link(salt))
            second = request("second", 2, prompt_token_ids=conversation, block_hashes=names)
            engine.send(Generate(request=second))
            router.wait_for_end("second")
            assert router.outputs("second")[0].num_cached_tokens == num_cached

    def test_a_resumed_sequence_goes_on_where_it_was(self, router: RouterEnd, engine: Instance) -> None:
        sequence = request("a", 7, max_tokens=8)
        tokens = answer(sequence)
        engine.send(Generate(request=continuation(sequence, tokens[:3])))
        router.wait_for_end("a")
        assert router.tokens("a") == tokens[3:]

    def test_logprobs_are_passed_on(self, router: RouterEnd, engine: Instance) -> None:
        engine.send(Generate(request=request("a", 3, max_tokens=2, logprobs=0)))
        router.wait_for_end("a")
        chosen = [position.chosen.token_id for output in router.outputs("a") for position in output.logprobs]
        assert chosen == router.tokens("a")

    @pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 40])
    def test_prompt_logprobs_are_collected_over_the_chunks(
        self, router: RouterEnd, engine: Instance, num_tokens: int
    ) -> None:
        sequence = request("a", num_tokens, max_tokens=2, prompt_logprobs=0)
        engine.send(Generate(request=sequence))
        router.wait_for_end("a")
        first, second = router.outputs("a")
        chosen = tuple(position.chosen.token_id for position in first.prompt_logprobs)
        assert chosen == sequence.prompt_token_ids[1:]
        assert second.prompt_logprobs == ()


class TestEndOfSequence:
    def end(self, router: RouterEnd, engine: Instance, **fields: Any) -> list[int]:
        """Answer with the third token (of eight) as a stop token."""
        plain = request("a", 5, max_tokens=8)
        third = answer(plain)[2]
        given = {name: (third,) if value == "third" else value for name, value in fields.items()}
        engine.send(Generate(request=request("a", 5, max_tokens=8, **given)))
        router.wait_for_end("a")
        return router.tokens("a")

    def test_an_end_of_sequence_token_stops(self, router: RouterEnd, engine: Instance) -> None:
        assert len(self.end(router, engine, eos_token_ids="third")) == 3
        last = router.outputs("a")[-1]
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, last.token_ids[-1])

    def test_ignore_eos_goes_on(self, router: RouterEnd, engine: Instance) -> None:
        assert len(self.end(router, engine, eos_token_ids="third", ignore_eos=True)) == 8
        assert router.outputs("a")[-1].stop_token_id is None

    def test_a_stop_token_stops_in_spite_of_ignore_eos(self, router: RouterEnd, engine: Instance) -> None:
        assert len(self.end(router, engine, stop_token_ids="third", ignore_eos=True)) == 3

    @pytest.mark.parametrize(("min_tokens", "length"), [(2, 3), (3, 8)])
    def test_nothing_stops_before_min_tokens(
        self, router: RouterEnd, engine: Instance, min_tokens: int, length: int
    ) -> None:
        assert len(self.end(router, engine, stop_token_ids="third", min_tokens=min_tokens)) == length


class TestRefusal:
    @pytest.mark.parametrize(
        ("wrong", "kind", "words"),
        [
            (request("a", MAX_MODEL_LEN, max_tokens=1), FailureKind.TOO_LONG, f"limit is {MAX_MODEL_LEN}"),
            (request("a", 0), FailureKind.INTERNAL, "no tokens"),
            (continuation(request("a", 2), (VOCAB_SIZE,)), FailureKind.INTERNAL, f"token id {VOCAB_SIZE}"),
            (request("a", 2, logit_bias=((-1, 1.0),)), FailureKind.INTERNAL, "token id -1"),
            (continuation(request("a", 2, max_tokens=3), (1, 2, 3)), FailureKind.INTERNAL, "already generated"),
        ],
    )
    def test_what_cannot_be_computed_is_given_back(
        self, router: RouterEnd, engine: Instance, wrong: GenerationRequest, kind: FailureKind, words: str
    ) -> None:
        engine.send(Generate(request=wrong))
        failed = router.expect(Failed)
        assert (failed.request_id, failed.epoch, failed.kind) == (wrong.request_id, wrong.epoch, kind)
        assert words in failed.message

    def test_what_outgrows_the_pool_is_given_back(self, router: RouterEnd) -> None:
        with Instance(router, "small", num_blocks=4) as engine:
            engine.send(Generate(request=request("a", 10, max_tokens=7)))
            failed = router.expect(Failed)
            assert failed.kind is FailureKind.TOO_LONG
            assert "17 tokens, the instance's limit is 16" in failed.message
            engine.send(Generate(request=request("a", 10, max_tokens=6, epoch=2)))
            router.wait_for_end("a")

    def test_a_malformed_message_is_ignored(self, router: RouterEnd, engine: Instance) -> None:
        router.send_bytes(engine.name, b"\xc1 garbage")
        engine.send(Generate(request=request("a", 3)))
        router.wait_for_end("a")

    def test_an_old_epoch_is_ignored_and_a_newer_one_takes_over(self, router: RouterEnd, engine: Instance) -> None:
        engine.executor.gate.close()
        engine.send(Generate(request=request("a", 3, epoch=2, max_tokens=80)))
        engine.send(Generate(request=request("a", 5, epoch=1)), abort("a", epoch=1))
        engine.settle()
        engine.send(Generate(request=request("a", 6, epoch=3)))
        engine.settle()
        engine.executor.gate.open()
        router.wait_for_end("a")
        outputs = router.outputs("a")
        assert {output.epoch for output in outputs} == {2, 3}
        newest = [token for output in outputs if output.epoch == 3 for token in output.token_ids]
        assert newest == answer(request("a", 6))
        engine.wait_until_idle()

    def test_a_repeated_message_changes_nothing(self, router: RouterEnd, engine: Instance) -> None:
        engine.send(Generate(request=request("a", 5)), Generate(request=request("a", 5)))
        router.wait_for_end("a")
        engine.send(Generate(request=request("a", 5)), Generate(request=request("b", 5)))
        router.wait_for_end("b")
        engine.wait_until_idle()
        assert len(router.tokens("a")) == 6


class TestFailure:
    @pytest.mark.parametrize("position", [0, 1, 18])  # in the first chunk of the prompt, the second, and a decode
    def test_a_sequence_that_fails_in_a_step_is_given_back_alone(
        self, router: RouterEnd, engine: Instance, position: int
    ) -> None:
        sequences = [request(name, 18, seed=n) for n, name in enumerate(("a", "bad", "c"))]
        engine.executor.failures["bad"] = position
        engine.send(*(Generate(request=sequence) for sequence in sequences))
        failed = router.expect(Failed)
        assert (failed.request_id, failed.kind, failed.message) == (
            "bad",
            FailureKind.INTERNAL,
            "its logits are broken",
        )
        router.wait_for_end("a", "c")
        assert [router.tokens(name) for name in ("a", "c")] == [answer(sequences[0]), answer(sequences[2])]
        assert len(router.tokens("bad")) == (position == 18)
        engine.wait_until_idle()

    def test_the_same_request_may_come_again(self, router: RouterEnd, engine: Instance) -> None:
        engine.executor.failures["bad"] = 0
        engine.send(Generate(request=request("bad", 5)))
        router.expect(Failed)
        engine.executor.failures.clear()
        engine.send(Generate(request=request("bad", 5, epoch=2)))
        router.wait_for_end("bad")
        assert router.tokens("bad") == answer(request("bad", 5))


class TestAbort:
    def test_while_waiting(self, router: RouterEnd) -> None:
        one_at_a_time = SchedulerSettings(max_batch_size=1)
        with Instance(router, "narrow", settings=one_at_a_time) as engine:
            engine.executor.gate.close()
            engine.send(Generate(request=request("a", 3, max_tokens=80)))
            engine.settle()
            engine.send(Generate(request=request("b", 3)), abort("b"))
            engine.settle()
            engine.send(abort("a"))
            engine.executor.gate.open()
            engine.wait_until_idle()
            assert all("b" not in step for step in engine.executor.steps)

    def test_while_its_step_runs(self, router: RouterEnd, engine: Instance) -> None:
        engine.executor.gate.close()
        engine.send(Generate(request=request("a", 3, max_tokens=80)), Generate(request=request("b", 3, max_tokens=80)))
        engine.settle()
        engine.send(abort("a"))
        engine.settle()
        num_tokens = len(router.tokens("a"))
        engine.executor.gate.open()
        router.wait_for_end("b")
        engine.wait_until_idle()
        assert len(router.tokens("a")) <= num_tokens + 1  # the step that ran when the abort came

    def test_while_leased(self, router: RouterEnd, engine: Instance) -> None:
        engine.send(Generate(request=request("a", 9), hand_over=True))
        router.expect(Offered)
        engine.send(abort("a"))
        engine.wait_until_idle()

    def test_an_unknown_sequence(self, router: RouterEnd, engine: Instance) -> None:
        nobody = request("nobody", 1)
        engine.send(abort("nobody"), Release(request_id=nobody.request_id, epoch=nobody.epoch))
        engine.send(Generate(request=request("a", 3)))
        router.wait_for_end("a")


class TestLife:
    def test_stop_ends_the_loop(self, router: RouterEnd) -> None:
        with Instance(router, "colocated-0") as engine:
            engine.send(Generate(request=request("a", 3, max_tokens=80)), Stop())
            engine.join()

    def test_an_idle_instance_gives_signs_of_life(self, router: RouterEnd, engine: Instance) -> None:
        router.wait(lambda: len(router.all(LoadReport)) >= 3)
        report = router.all(LoadReport)[-1]
        assert (report.instance, report.incarnation) == ("colocated-0", "a1")
        assert report.load.blocks_free == report.load.blocks_total == engine.num_blocks

    def test_a_fault_of_the_model_ends_the_instance_with_it(self, router: RouterEnd) -> None:
        with Instance(router, "colocated-0") as engine:
            engine.executor.error = InternalError("broken")
            engine.send(Generate(request=request("a", 3)))
            engine.join()
            assert engine.error is engine.executor.error
            engine.error = None


class TestEventLog:
    def test_the_replay_of_a_live_run_gives_the_same_actions(self, router: RouterEnd, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        with Instance(router, "colocated-0", num_blocks=24, log_path=path, prefix_caching=True) as engine:
            sequences = [request(f"s{n}", 2 + 5 * n, max_tokens=12, seed=n) for n in range(6)]
            engine.send(*(Generate(request=sequence) for sequence in sequences), abort("s3"))
            engine.send(Generate(request=request("handed", 9), hand_over=True))
            engine.send(release(router.expect(Offered).offer))
            router.wait_for_end("s0", "s1", "s2", "s4", "s5")
            engine.wait_until_idle()
        log = parse_log(path.read_bytes().splitlines(keepends=True))
        assert len(log.records) > 10
        assert replay(log) is None
