"""A real instance with a tiny model plays scripts: what is measured is what the script is about."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec import structs

from disagg.base.config import CacheSettings, DType, InstanceSettings, ModelSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.calibration.steps.campaign import Campaign, measure
from disagg.calibration.steps.profiled_instance import ProfiledInstance
from disagg.calibration.steps.script import Script

DEADLINE_S = 60.0
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def settings(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> InstanceSettings:
    return InstanceSettings(
        instance=InstanceId("profiled"),
        role=Role.COLOCATED,
        control_endpoint=f"ipc://{tmp_path_factory.mktemp('profiling')}/control",
        model=ModelSettings(model=str(tiny_model("llama")), dtype=DType.FLOAT32),
        cache=CacheSettings(kv_memory_bytes=4 << 20, block_size=BLOCK_SIZE),
        scheduler=SchedulerSettings(max_batch_tokens=64, max_batch_size=8),
    )


@pytest.fixture(scope="module")
def instance(settings: InstanceSettings) -> Iterator[ProfiledInstance]:
    with ProfiledInstance(settings, DEADLINE_S) as instance:
        assert instance.wait_until_ready().block_size == BLOCK_SIZE
        yield instance


def test_the_scheduler_cuts_prompts_into_chunks(instance: ProfiledInstance) -> None:
    result = instance.run(Script(prompt_lens=(150,)))
    assert [step.chunks for step in result.prefill_steps] == [((0, 64),), ((64, 64),), ((128, 22),)]
    assert all(step.time_s > 0 for step in result.prefill_steps)
    assert result.decode_steps == ()


def test_short_prompts_share_a_step(instance: ProfiledInstance) -> None:
    (step,) = instance.run(Script(prompt_lens=(10, 20, 30))).prefill_steps
    assert step.chunks == ((0, 10), (0, 20), (0, 30))


def test_decodes_have_their_contexts_without_a_prefill(instance: ProfiledInstance) -> None:
    result = instance.run(Script(decode_contexts=(100, 7, 33), num_decode_steps=3))
    assert len(result.decode_steps) == 3
    for step in result.decode_steps:
        assert step.is_decode
        assert all(
            context <= start < context + 10 for (start, _), context in zip(step.chunks, (100, 7, 33), strict=True)
        )
    assert result.prefill_steps == ()


def test_a_chunk_runs_beside_decodes(instance: ProfiledInstance) -> None:
    result = instance.run(Script(decode_contexts=(50, 60), prompt_lens=(70,), num_decode_steps=1))
    sizes = [sorted(num_tokens for _, num_tokens in step.chunks) for step in result.prefill_steps]
    assert sizes[:2] == [[1, 1, 62], [1, 1, 8]]


def test_an_endless_script_ends_when_told(instance: ProfiledInstance) -> None:
    for script in (Script(prompt_lens=(30,), is_endless=True), Script(decode_contexts=(500,) * 2, is_endless=True)):
        instance.run(script)
        instance.stop()
        assert len(instance.run(Script(prompt_lens=(5,))).prefill_steps) == 1


def test_a_campaign_measures_alone_and_beside(settings: InstanceSettings) -> None:
    cores = sorted(os.sched_getaffinity(0))
    settings = structs.replace(settings, cpus=(cores[0],))
    neighbour = structs.replace(settings, instance=InstanceId("neighbour"), cpus=(cores[-1],))
    told: list[tuple[str, float]] = []
    campaign = Campaign(instance=settings, neighbour=neighbour, quick=True, alone_s=0.0, beside_s=0.0)
    measured = measure(campaign, lambda *progress: told.append(progress))
    assert len(measured.alone) > 20
    assert measured.beside.keys() == {"prefill", "decode"}
    for parts in measured.beside.values():
        assert sum(len(part.steps) for part in parts) >= 2
        for part in parts:  # read before, and after
            assert len(part.memory) == 2
            assert all(reading.alone > 0 and reading.together > 0 for reading in part.memory)
    assert list(dict.fromkeys(what for what, _ in told)) == [
        "loading",
        "steps alone",
        "steps beside prefill",
        "steps beside decode",
    ]
    assert all(0 <= fraction <= 1 for _, fraction in told)


def test_settings_that_cannot_be_used_are_said(settings: InstanceSettings, tmp_path: Path) -> None:
    absent = structs.replace(settings, model=ModelSettings(model=str(tmp_path / "absent")))
    with ProfiledInstance(absent, DEADLINE_S) as instance, pytest.raises(ConfigurationError, match="absent"):
        instance.wait_until_ready()
