import pytest

from disagg.base.errors import ConfigurationError
from disagg.base.window_blocks import WindowBlocks
from disagg.cache.layout import KvDtype, KvFormat, KvLayout


def layout(**changes: object) -> KvLayout:
    fields = {
        "num_layers": 30,
        "num_blocks": 100,
        "num_kv_heads": 3,
        "block_size": 32,
        "head_dim": 64,
        "dtype": KvDtype.BFLOAT16,
        "format": KvFormat.INTERLEAVED,
    }
    return KvLayout(**{**fields, **changes})  # type: ignore[arg-type]


def test_bytes_of_smollm2() -> None:
    # SmolLM2-135M: 30 layers x 3 KV heads x 64 dimensions x K and V x 2 bytes = 23,040 bytes a token.
    assert layout().block_bytes == 23_040 * 32
    assert layout().total_bytes == 23_040 * 32 * 100


def test_the_last_block_of_the_last_layer_ends_the_pool() -> None:
    kv = layout()
    assert kv.offset(29, 99) + kv.layer_block_bytes == kv.total_bytes


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (32, 1), (33, 2)])
def test_blocks_for_tokens(num_tokens: int, num_blocks: int) -> None:
    assert layout().num_blocks_for(num_tokens) == num_blocks


def test_a_bad_shape_names_the_field_and_the_value() -> None:
    with pytest.raises(ConfigurationError, match="num_layers must be at least 1, got 0"):
        layout(num_layers=0)
    with pytest.raises(ConfigurationError, match=r"block_size \(15\)"):
        layout(block_size=15)


@pytest.mark.parametrize(("num_layers", "num_window_layers", "expected"), [(4, 22, 6), (8, 40, 5), (13, 13, 1)])
def test_layers_with_a_window_are_in_as_many_more_blocks_as_it_takes(
    num_layers: int, num_window_layers: int, expected: int
) -> None:
    """As in Gemma 3 with 1B and 12B parameters, and Gemma 2 with 2B."""
    kv = layout(num_layers=num_layers, num_window_layers=num_window_layers, window=512)
    assert kv.window_blocks == WindowBlocks(512, expected)
    assert layout().window_blocks is None


@pytest.mark.parametrize("fields", [{"num_window_layers": 4}, {"window": 9}, {"num_window_layers": -1, "window": 9}])
def test_layers_and_window_go_together(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="cannot have a window"):
        layout(**fields)
