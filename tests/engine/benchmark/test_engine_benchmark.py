"""The floors are sums that can be done by hand; the measuring runs the real decoder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from disagg.cli.main import main
from disagg.engine.benchmark.cases import ElementSizes, Limit, Phase, StepCase, standard_cases, with_floors
from disagg.engine.benchmark.peaks import MachinePeaks
from disagg.models.locate import ModelFiles, load_config

PEAKS = MachinePeaks(read_bandwidth=10e9, gemm_flops=100e9)
BF16 = ElementSizes(weight=2, cache=2)


def test_the_floors_of_a_decode_step_are_weights_and_kv_over_bandwidth(default_model: ModelFiles) -> None:
    config = load_config(default_model)
    case = StepCase(Phase.DECODE, batch=4, new_tokens=1, context=1000)
    # SmolLM2-135M in bf16: 134.5 million weights in matrix products, 23,040 bytes of KV a token.
    assert case.products(config, BF16).read_bytes == config.num_linear_parameters * 2
    assert case.products(config, ElementSizes(1, 2)).read_bytes == config.num_linear_parameters
    assert case.attention(config, BF16).read_bytes == 4 * 1000 * 23_040
    step = with_floors(case, 0.1, config, PEAKS, BF16)
    assert step.limit is Limit.MEMORY
    assert step.memory_floor_s == pytest.approx((config.num_linear_parameters * 2 + 4 * 1000 * 23_040) / 10e9)
    assert step.share == pytest.approx(step.memory_floor_s / 0.1)


def test_products_and_attention_in_turn_cost_the_sum_of_their_own_floors(default_model: ModelFiles) -> None:
    """Many sequences: the products are bound by arithmetic, attention by memory."""
    config = load_config(default_model)
    step = with_floors(StepCase(Phase.DECODE, batch=64, new_tokens=1, context=1000), 4.0, config, PEAKS, BF16)
    products_s = 2 * 64 * config.num_linear_parameters / 100e9
    attention_s = 64 * 1000 * 23_040 / 10e9
    assert step.share_in_turn == pytest.approx((products_s + attention_s) / 4.0)


def test_a_prefill_is_bound_by_its_operations(default_model: ModelFiles) -> None:
    config = load_config(default_model)
    step = with_floors(StepCase(Phase.PREFILL, 1, 512, 512), 3.0, config, PEAKS, BF16)
    assert step.limit is Limit.COMPUTE
    body = config.num_linear_parameters - config.vocab_size * config.hidden_size
    pairs = 512 * 513 // 2
    expected = 2 * 512 * body + 2 * config.vocab_size * config.hidden_size + 30 * 4 * 576 * pairs
    assert step.compute_floor_s == pytest.approx(expected / 100e9)


def test_no_case_is_longer_than_the_model() -> None:
    assert max(case.context for case in standard_cases(1024, quick=False)) == 1024


def test_the_command_prints_a_line_of_json_for_each_step(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    ran = CliRunner().invoke(main, ["bench", "engine", str(folder), "--quick", "--json"], catch_exceptions=False)
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert rows
    assert {row["case"]["phase"] for row in rows} <= {"prefill", "decode"}
    assert all(row["time_s"] > 0 and row["threads"] == 1 for row in rows)
