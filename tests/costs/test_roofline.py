"""Predictions from shapes and data sheets: what must grow with what, and how far they are from measured fits."""

from dataclasses import replace

import msgspec
import pytest

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import find_device
from disagg.costs.latency import StepShape
from disagg.costs.links import InstanceLinks
from disagg.costs.published import PublishedPlatform
from disagg.costs.roofline import RooflinePlatform
from disagg.models.config import Architecture, ModelConfig
from disagg.models.known_shapes import KNOWN_SHAPES
from disagg.models.shape import ModelShape

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
        rotary_dim=128,
        attention_scale=128**-0.5,
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


def test_a_mixture_of_experts_computes_what_its_tokens_chose_and_reads_what_they_chose_together() -> None:
    """Mixtral 8x7B beside a dense model of the weights that one token passes, and beside one of all its weights."""
    mixtral, device = KNOWN_SHAPES["mixtral-8x7b"], find_device("a100-sxm")
    widths = {"two experts": 2 * 14_336, "all experts": 8 * 14_336}
    dense = {
        name: msgspec.structs.replace(mixtral, layer_experts=(), intermediate_size=width)
        for name, width in widths.items()
    }

    def step_s(shape: ModelShape, step: StepShape) -> float:
        return sum(RooflinePlatform(shape, device, "mixtral").latency(2, 1).stage_times_s(step))

    one = StepShape(num_decodes=1, decode_context=1000, num_samples=1)
    many = StepShape(num_decodes=32, decode_context=32_000, num_samples=32)
    prefill = StepShape(num_prefills=1, num_prefill_tokens=4096, prefill_squares=4096**2, num_samples=1)
    assert step_s(mixtral, one) == pytest.approx(step_s(dense["two experts"], one), rel=0.001)
    assert step_s(mixtral, many) == pytest.approx(step_s(dense["all experts"], many), rel=0.001)
    assert step_s(mixtral, prefill) == pytest.approx(step_s(dense["two experts"], prefill), rel=0.001)
    # All experts take memory, whoever is chosen.
    for name in widths:
        tokens = RooflinePlatform(dense[name], device, name).capacity_tokens(4, 1)
        own = RooflinePlatform(mixtral, device, "mixtral").capacity_tokens(4, 1)
        assert (own == pytest.approx(tokens, rel=0.001)) == (name == "all experts")


def test_capacity_is_that_of_the_published_table() -> None:
    published = PublishedPlatform("distserve", "facebook/opt-13b")
    for tensor, pipeline in ((1, 1), (2, 1), (2, 2)):
        expected = published.capacity_tokens(tensor, pipeline)
        assert platform().capacity_tokens(tensor, pipeline) == pytest.approx(expected, rel=0.06)
    assert platform().kv_bytes_per_token == published.kv_bytes_per_token


def test_sliding_layers_spare_hand_overs_what_is_past_their_window() -> None:
    sliding = msgspec.structs.replace(config(), sliding_windows=(None, 512, 512, 512) * 10)
    window = RooflinePlatform(sliding, find_device("a100-sxm"), "13b").kv_window
    assert window is not None
    assert (window.tokens, window.bytes_per_token) == (512, platform().kv_bytes_per_token * 3 // 4)
    assert [window.spared_bytes(n) / window.bytes_per_token for n in (100, 511, 512, 1023)] == [0, 0, 1, 512]
    assert platform().kv_window is None
    never_outgrown = msgspec.structs.replace(config(), sliding_windows=(None, 2048) * 20)
    assert RooflinePlatform(never_outgrown, find_device("a100-sxm"), "13b").kv_window is None


@pytest.mark.parametrize("shape", [PREFILL, DECODE])
def test_tensor_parallelism_helps_less_than_in_proportion(shape: StepShape) -> None:
    (one,) = platform().latency(1, 1).stage_times_s(shape)
    (two,) = platform().latency(2, 1).stage_times_s(shape)
    (four,) = platform().latency(4, 1).stage_times_s(shape)
    assert one / 2 < two < one
    assert two / 2 < four < two


@pytest.mark.parametrize("degree", [1, 2])
def test_a_run_of_decode_steps_takes_what_each_of_them_does_to_the_last_bit(degree: int) -> None:
    latency, shape = platform().latency(degree, 1), replace(DECODE)
    run_s = latency.decode_run_s(shape, 50)
    for time_s in run_s:
        assert latency.stage_times_s(shape) == (time_s,)
        shape.decode_context += shape.num_decodes
    assert len(run_s) == 50


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


def test_slower_links_make_steps_longer_by_what_they_carry() -> None:
    """Two all-reduces a layer of a half of the tokens' vectors each way, and a send from stage to stage."""
    fast = find_device("a100-sxm").peer
    slow = replace(fast, bytes_per_s=fast.bytes_per_s / 10)
    added_s = PREFILL.num_tokens * 5120 * 2 * (1 / slow.bytes_per_s - 1 / fast.bytes_per_s)
    (near,) = platform().latency(2, 1).stage_times_s(PREFILL)
    (far,) = platform().latency(2, 1, InstanceLinks.alike(slow, 1)).stage_times_s(PREFILL)
    assert far - near == pytest.approx(2 * 40 * added_s)
    near_stages = platform().latency(1, 3).stage_times_s(PREFILL)
    far_stages = platform().latency(1, 3, InstanceLinks(fast, (fast, slow))).stage_times_s(PREFILL)
    added = [far - near for far, near in zip(far_stages, near_stages, strict=True)]
    assert added == pytest.approx([0, added_s, 0])


@pytest.mark.parametrize(
    ("batch", "context", "measured_ms"),
    [(1, 256, 7.6), (1, 4096, 11.0), (4, 1024, 11.8), (16, 1024, 26.9), (32, 1024, 54.5), (64, 4096, 310.4)],
)
def test_a_core_decodes_as_it_was_measured_to(batch: int, context: int, measured_ms: float) -> None:
    shape = StepShape(num_decodes=batch, decode_context=batch * context, num_samples=batch)
    assert core_step_s(shape) == pytest.approx(measured_ms / 1e3, rel=0.15)


@pytest.mark.parametrize(("length", "measured_ms"), [(128, 67.0), (512, 276.6), (1024, 605.7), (2048, 1422.8)])
def test_a_core_prefills_as_it_was_measured_to(length: int, measured_ms: float) -> None:
    shape = StepShape(num_prefills=1, num_prefill_tokens=length, prefill_squares=length**2, num_samples=1)
    assert core_step_s(shape) == pytest.approx(measured_ms / 1e3, rel=0.05)


def core_step_s(shape: StepShape) -> float:
    """SmolLM2-135M on one thread, of which docs/results/engine.md has the measurements."""
    model = msgspec.structs.replace(
        config(num_layers=30),
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
    )
    (time_s,) = RooflinePlatform(model, find_device("zen5-core"), "smollm2").latency(1, 1).stage_times_s(shape)
    return time_s


def test_what_cannot_be_placed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="do not divide by tensor parallelism 3"):
        platform().latency(3, 1)
    with pytest.raises(ConfigurationError, match="too few for pipeline parallelism 41"):
        platform().latency(1, 41)
    with pytest.raises(ConfigurationError, match="leave no room for KV on 1 x a100"):
        platform(num_layers=160).capacity_tokens(1, 1)
    with pytest.raises(ConfigurationError, match="no data sheet of a device 'abacus'; there are a100"):
        find_device("abacus")
