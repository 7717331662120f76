"""Which steps are measured, in which order a script goes, and what its repetitions are joined to."""

from itertools import count

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg.base.ids import InstanceId, RequestId
from disagg.base.message_fields import Message
from disagg.base.messages import Abort, Adopt, Generate, InstanceFacts, Pulled, Ready, SequenceOutput, StepOutput
from disagg.base.request import Role
from disagg.base.sampling import FinishReason
from disagg.calibration.steps.player import ScriptPlayer, ScriptStage
from disagg.calibration.steps.script import (
    MeasuredStep,
    Script,
    ScriptLimits,
    ScriptResult,
    joined_steps,
    neighbour_scripts,
    standard_scripts,
)

LIMITS = ScriptLimits(capacity_tokens=46_592, max_model_len=8192, max_batch_size=64, block_size=32)
READY = Ready(
    version=1,
    instance=InstanceId("a"),
    incarnation="i",
    role=Role.COLOCATED,
    facts=InstanceFacts(
        pid=1,
        device="cpu",
        kernel_backend="fake",
        num_blocks=100,
        block_size=16,
        max_model_len=1000,
        vocab_size=50,
        weight_bytes=0,
        kv_bytes=0,
        load_s=0.0,
        pool=b"pool",
    ),
)


def test_scripts_cover_batches_prompts_alone_and_both_together() -> None:
    scripts = standard_scripts(LIMITS, seed=0)
    assert {1, 8, 32, 64} <= {len(script.decode_contexts) for script in scripts}
    assert any(len(script.prompt_lens) == 1 and not script.decode_contexts for script in scripts)
    assert any(len(script.prompt_lens) > 2 and not script.decode_contexts for script in scripts)
    assert any(script.prompt_lens and len(script.decode_contexts) > 8 for script in scripts)
    assert max(sum(script.decode_contexts) for script in scripts) > LIMITS.capacity_tokens / 8
    assert max(max(script.prompt_lens, default=0) for script in scripts) > 1000


def test_equal_seeds_give_equal_scripts() -> None:
    assert standard_scripts(LIMITS, seed=3) == standard_scripts(LIMITS, seed=3)
    assert standard_scripts(LIMITS, seed=3) != standard_scripts(LIMITS, seed=4)
    assert len(standard_scripts(LIMITS, seed=3, quick=True)) < len(standard_scripts(LIMITS, seed=3)) / 2


@given(
    st.integers(0, 10**6),
    st.booleans(),
    st.builds(
        ScriptLimits,
        capacity_tokens=st.integers(8192, 10**6),
        max_model_len=st.integers(64, 32_768),
        max_batch_size=st.integers(1, 300),
        block_size=st.sampled_from((2, 16, 32)),
    ),
)
def test_every_script_fits_into_the_instance(seed: int, quick: bool, limits: ScriptLimits) -> None:
    for script in (*standard_scripts(limits, seed, quick), *neighbour_scripts(limits).values()):
        lengths = script.decode_contexts + script.prompt_lens
        assert lengths
        assert len(lengths) <= limits.max_batch_size
        assert 0 < max(lengths) < limits.max_model_len
        blocks = sum(-(-length // limits.block_size) + 1 for length in lengths)
        assert blocks * limits.block_size <= limits.capacity_tokens


def turn(time_s: float, *chunks: tuple[int, int], on_core: float = 1.0) -> MeasuredStep:
    return MeasuredStep(chunks=chunks, time_s=time_s, on_core=on_core)


def pulled(message: Message) -> Pulled:
    assert isinstance(message, Adopt)
    return Pulled(
        request_id=message.request.request_id,
        epoch=message.request.epoch,
        source=message.offer.source,
        num_bytes=100 * len(message.offer.block_ids),
        duration_s=0.001,
    )


def finished(request_id: RequestId) -> StepOutput:
    output = SequenceOutput(request_id, READY.facts.pid, (1,), FinishReason.LENGTH)  # type: ignore[arg-type]
    return StepOutput(outputs=(output,))


def test_decodes_are_adopted_measured_alone_then_beside_prompts_and_aborted() -> None:
    player = ScriptPlayer(Script(decode_contexts=(30, 40), prompt_lens=(5,), num_decode_steps=2), READY, count())
    first, second = player.begin()
    assert isinstance(second, Adopt)
    assert len(second.request.prompt_token_ids) == second.offer.num_tokens == 40
    assert second.offer.pool == b"pool"

    assert player.after_turn(turn(0.1, (30, 1)), [pulled(first)]) == []  # not all are there yet
    assert not player.has_begun
    assert player.after_turn(turn(0.2, (31, 1), (40, 1)), [pulled(second)]) == []  # their arrival took time too
    assert player.has_begun
    assert player.after_turn(turn(0.3, (32, 1), (41, 1)), []) == []
    (prompt,) = player.after_turn(turn(0.4, (33, 1), (42, 1)), [])
    assert isinstance(prompt, Generate)
    assert player.after_turn(turn(0.5, (34, 1), (43, 1), (0, 5)), []) == []
    aborts = player.after_turn(turn(0.6, (35, 1), (44, 1)), [finished(prompt.request.request_id)])
    assert [type(message) for message in aborts] == [Abort, Abort]
    player.after_turn(turn(0.7), [])
    assert player.stage is ScriptStage.DONE

    result = player.result()
    assert [step.time_s for step in result.decode_steps] == [0.3, 0.4]
    assert [step.time_s for step in result.prefill_steps] == [0.5, 0.6]


def test_an_endless_script_begins_again_until_it_is_stopped() -> None:
    prompts = ScriptPlayer(Script(prompt_lens=(5,), is_endless=True), READY, count())
    (first,) = prompts.begin()
    assert prompts.has_begun
    assert isinstance(first, Generate)
    (again,) = prompts.after_turn(turn(0.1, (0, 5)), [finished(first.request.request_id)])
    assert isinstance(again, Generate)
    prompts.stop()
    assert prompts.after_turn(turn(0.1, (0, 5)), [finished(again.request.request_id)]) == []
    assert prompts.stage is ScriptStage.CLEARING
    assert prompts.result() == ScriptResult()

    decodes = ScriptPlayer(Script(decode_contexts=(5,), is_endless=True), READY, count())
    (adopt,) = decodes.begin()
    decodes.after_turn(turn(0.1, (5, 1)), [pulled(adopt)])
    (adopt_again,) = decodes.after_turn(turn(0.1), [])  # it had reached its length
    assert isinstance(adopt_again, Adopt)
    assert decodes.after_turn(turn(0.1), []) == []  # it is being pulled
    decodes.stop()
    (abort,) = decodes.after_turn(turn(0.1, (5, 1)), [pulled(adopt_again)])
    assert isinstance(abort, Abort)


def test_a_pull_that_ends_with_its_script_is_no_fault() -> None:
    player = ScriptPlayer(Script(decode_contexts=(5,), is_endless=True), READY, count())
    (adopt,) = player.begin()
    player.after_turn(turn(0.1, (5, 1)), [pulled(adopt)])
    (adopt_again,) = player.after_turn(turn(0.1), [])  # it had reached its length
    player.stop()
    (abort,) = player.after_turn(turn(0.1), [])  # while the KV is on its way
    assert isinstance(abort, Abort)
    player.after_turn(turn(0.1), [msgspec.structs.replace(pulled(adopt_again), failure="aborted")])
    assert player.stage is ScriptStage.DONE


def test_a_pull_that_fails_while_its_script_runs_is_a_fault() -> None:
    player = ScriptPlayer(Script(decode_contexts=(5,)), READY, count())
    (adopt,) = player.begin()
    with pytest.raises(AssertionError, match="the pool is gone"):
        player.after_turn(turn(0.1), [msgspec.structs.replace(pulled(adopt), failure="the pool is gone")])


def test_repetitions_become_one_step() -> None:
    first = ScriptResult(
        decode_steps=(turn(0.9, (10, 1)), turn(0.1, (11, 1))), prefill_steps=(turn(2.0, (0, 8)), turn(9.0, (8, 8)))
    )
    second = ScriptResult(decode_steps=(turn(0.2, (10, 1)),), prefill_steps=(turn(3.0, (0, 8)), turn(4.0, (8, 8))))
    third = ScriptResult(prefill_steps=(turn(7.0, (0, 8)), turn(5.0, (8, 8))))
    assert [one.time_s for one in joined_steps([first, second, third])] == pytest.approx([0.4, 4.0, 6.0])
    assert [one.time_s for one in joined_steps([third])] == [7.0, 5.0]


def test_a_repetition_that_lost_its_core_does_not_count() -> None:
    steps = (turn(3.0, (9, 1), on_core=0.99), turn(5.0, (9, 1), on_core=0.5), turn(6.0, (9, 1), on_core=0.4))
    assert joined_steps([ScriptResult(decode_steps=steps)]) == [steps[0]]
    # With a device to wait for, no repetition has the core for itself, and none is worse than another.
    waiting = tuple(turn(time_s, (9, 1), on_core=0.3) for time_s in (3.0, 5.0, 6.0))
    assert joined_steps([ScriptResult(decode_steps=waiting)]) == [turn(14.0 / 3, (9, 1), on_core=0.3)]
    many = tuple(turn(time_s, (9, 1)) for time_s in range(1, 22))
    assert [one.time_s for one in joined_steps([ScriptResult(decode_steps=many)])] == [11]


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_neighbours_compute_without_end(name: str) -> None:
    script = neighbour_scripts(LIMITS)[name]
    assert script.is_endless
    assert bool(script.prompt_lens) == (name == "prefill")
