"""How many blocks fit, how long a sequence may be, and the words when it does not work out."""

import msgspec
import pytest

from disagg.base.config import CacheSettings, DType, ModelSettings, SchedulerSettings
from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvDtype, KvFormat
from disagg.engine.facts import Capacity, check_memory, layer_tables, plan_capacity
from disagg.models.config import Architecture, ModelConfig

CONFIG = ModelConfig(
    architecture=Architecture.LLAMA,
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rotary_dim=4,
    attention_scale=0.5,
    max_position_embeddings=256,
    sliding_windows=(None, None, None),
    tie_word_embeddings=True,
)
BLOCK_BYTES = 3 * 2 * 2 * 4 * 8 * 4  # layers, K and V, heads, head_dim, block size, float32


def plan(kv_memory_bytes: int, max_model_len: int | None = None, dtype: DType = DType.FLOAT32) -> Capacity:
    return plan_capacity(
        ModelSettings(dtype=dtype, max_model_len=max_model_len),
        CacheSettings(kv_memory_bytes=kv_memory_bytes, block_size=8),
        CONFIG,
        KvFormat.INTERLEAVED,
    )


def test_the_memory_is_filled_with_whole_blocks() -> None:
    capacity = plan(100 * BLOCK_BYTES + BLOCK_BYTES - 1)
    assert capacity.layout.num_blocks == 100
    assert capacity.layout.block_bytes == BLOCK_BYTES
    assert (capacity.layout.dtype, capacity.layout.format) == (KvDtype.FLOAT32, KvFormat.INTERLEAVED)


def test_half_the_element_size_gives_twice_the_blocks() -> None:
    capacity = plan(100 * BLOCK_BYTES, dtype=DType.BFLOAT16)
    assert (capacity.layout.num_blocks, capacity.layout.dtype) == (200, KvDtype.BFLOAT16)


@pytest.mark.parametrize(("num_blocks", "expected"), [(100, 256), (32, 256), (31, 248), (1, 8)])
def test_the_longest_sequence_is_bounded_by_model_and_pool(num_blocks: int, expected: int) -> None:
    assert plan(num_blocks * BLOCK_BYTES).max_model_len == expected


def test_a_length_that_was_asked_for_is_kept() -> None:
    assert plan(100 * BLOCK_BYTES, max_model_len=50).max_model_len == 50


def test_a_pool_too_small_for_the_length_asked_for_is_refused_with_both_numbers() -> None:
    words = f"200 tokens needs 25 KV blocks, {25 * BLOCK_BYTES} bytes, but --kv-memory is {24 * BLOCK_BYTES} bytes"
    with pytest.raises(ConfigurationError, match=words):
        plan(24 * BLOCK_BYTES, max_model_len=200)


def test_a_pool_without_a_single_block_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--kv-memory is 100 bytes"):
        plan(100)


def test_more_than_the_model_was_made_for_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--max-model-len 257 is over the model's own limit of 256"):
        plan(1000 * BLOCK_BYTES, max_model_len=257)


def test_more_memory_than_there_is_is_refused() -> None:
    layout = plan(100 * BLOCK_BYTES).layout
    check_memory(layout, layout.total_bytes, "this host")
    with pytest.raises(ConfigurationError, match="this host has left: lower it"):
        check_memory(layout, layout.total_bytes - 1, "this host")


def test_memory_is_told_in_the_units_in_which_it_is_asked_for() -> None:
    layout = plan((1 << 40) + 1).layout
    with pytest.raises(ConfigurationError, match=r"^--kv-memory 1TiB is more than the 21.2GiB that this host has left"):
        check_memory(layout, 22_715_138_048, "this host")


@pytest.mark.parametrize(("has_tiers", "num_blocks", "longest"), [(False, 20, 96), (True, 6, 48)])
def test_a_window_makes_room_for_longer_sequences_unless_there_are_tiers(
    has_tiers: bool, num_blocks: int, longest: int
) -> None:
    """One layer of three sees all. Of 16 tokens and a chunk of 8 four blocks are in sight, with two beside each."""
    config = msgspec.structs.replace(CONFIG, sliding_windows=(16, None, 16))
    capacity = plan_capacity(
        ModelSettings(dtype=DType.FLOAT32),
        CacheSettings(kv_memory_bytes=20 * BLOCK_BYTES // 3, block_size=8),
        config,
        KvFormat.INTERLEAVED,
        SchedulerSettings(max_batch_tokens=8),
        has_tiers=has_tiers,
    )
    assert (capacity.layout.num_blocks, capacity.max_model_len) == (num_blocks, longest)
    assert layer_tables(config, capacity.layout) == (() if has_tiers else (1, 0, 2))


def test_what_a_long_sequence_needs_beside_its_blocks_is_in_the_words() -> None:
    config = msgspec.structs.replace(CONFIG, sliding_windows=(16, None, 16))
    with pytest.raises(ConfigurationError, match=r"a sequence of 96 tokens needs 20 KV blocks"):
        plan_capacity(
            ModelSettings(dtype=DType.FLOAT32, max_model_len=96),
            CacheSettings(kv_memory_bytes=19 * BLOCK_BYTES // 3, block_size=8),
            config,
            KvFormat.INTERLEAVED,
            SchedulerSettings(max_batch_tokens=8),
        )
