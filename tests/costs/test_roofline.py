"""Predictions from shapes and data sheets: what must grow with what, and how far they are from measured fits."""

import pytest

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import find_device
from disagg.costs.latency import StepShape
from disagg.costs.published import PublishedPlatform
from disagg.costs.roofline import RooflinePlatform
from disagg.models.config import Architecture, ModelConfig

PREFILL = StepShape(num_prefills=1, num_prefill_tokens=1000, prefill_squares=10**6, num_samples=1)
DECODE = StepShape(num_decodes=16, decode_context=16_000, num_samples=16)


def config(num_layers: int = 40) -> ModelConfig:
    """The size of OPT-13B: two matrices of 4 x hidden in its MLP make three of 8 / 3 here."""
    return ModelConfig(
        architecture=Architecture.LLAMA,
        vocab_size=50_272,
        hidden_size=5120,
        intermediate_size=13_653,
        num_layers=num_layers,
        num_heads=40,
        num_kv_heads=40,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
        sliding_windows=(None,) * num_layers,
        tie_word_embeddings=True,
    )


def platform(**changes: int) -> RooflinePlatform:
    return RooflinePlatform(config(**changes), find_device("a100-sxm"), "13b")


@pytest.mark.parametrize("shape", [PREFILL, DECODE])
def test_it_is_of_the_size_that_was_measured(shape: StepShape) -> None:
    """A data sheet and isolated kernels against DistServe's fit before scaling: the same device, a real engine."""
    (predicted_s,) = platform().latency(1, 1).stage_times_s(shape)
    measured = PublishedPlatform("distserve", "facebook/opt-13b", prefill_factor=1)
    (measured_s,) = measured.latency(1, 1).stage_times_s(shape)
    assert predicted_s == pytest.approx(measured_s, rel=0.35)


def test_capacity_is_that_of_the_published_table() -> None:
    published = PublishedPlatform("distserve", "facebook/opt-13b")
    for tensor, pipeline in ((1, 1), (2, 1), (2, 2)):
        expected = published.capacity_tokens(tensor, pipeline)
        assert platform().capacity_tokens(tensor, pipeline) == pytest.approx(expected, rel=0.06)
    assert platform().kv_bytes_per_token == published.kv_bytes_per_token


@pytest.mark.parametrize("shape", [PREFILL, DECODE])
def test_tensor_parallelism_helps_less_than_in_proportion(shape: StepShape) -> None:
    (one,) = platform().latency(1, 1).stage_times_s(shape)
    (two,) = platform().latency(2, 1).stage_times_s(shape)
    (four,) = platform().latency(4, 1).stage_times_s(shape)
    assert one / 2 < two < one
    assert two / 2 < four < two


def test_a_pipeline_adds_sending_and_splits_layers_as_evenly_as_it_can() -> None:
    (whole,) = platform(num_layers=41).latency(1, 1).stage_times_s(PREFILL)
    first, second = platform(num_layers=41).latency(1, 2).stage_times_s(PREFILL)
    assert whole < first + second < 1.01 * whole
    assert first == pytest.approx(whole * 21 / 41, rel=0.02)


def test_work_grows_with_every_part_of_a_step() -> None:
    latency = platform().latency(1, 1)
    small = StepShape(num_prefills=1, num_prefill_tokens=512, prefill_squares=512**2, num_decodes=8, decode_context=800)
    (base,) = latency.stage_times_s(small)
    for name, more in (("num_prefill_tokens", 64), ("prefill_squares", 10**6), ("decode_context", 8000)):
        larger = StepShape(**{**{field: getattr(small, field) for field in StepShape.__slots__}, name: 0})
        setattr(larger, name, getattr(small, name) + more)
        assert latency.stage_times_s(larger)[0] > base


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not divide by tensor parallelism 3"):
        platform().latency(3, 1)
    with pytest.raises(ConfigurationError, match="too few for pipeline parallelism 41"):
        platform().latency(1, 41)
    with pytest.raises(ConfigurationError, match="leave no room for KV on 1 x a100"):
        platform(num_layers=160).capacity_tokens(1, 1)
    with pytest.raises(ConfigurationError, match="no data sheet of a device 'abacus'; there are a100"):
        find_device("abacus")
