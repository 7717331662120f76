"""Blocks of one kind of instance, converted for another, give what that one would have computed itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from disagg.base.config import DType
from disagg.cache.layout import KvFormat
from disagg.cli.main import main
from disagg.engine.benchmark import engine_benchmark
from disagg.engine.benchmark.engine_benchmark import prepare
from disagg.engine.benchmark.kv_quality import KvQuality, measure_kinds
from disagg.engine.benchmark.peaks import MachinePeaks
from disagg.models.locate import locate_model


@pytest.fixture(autouse=True)
def _known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can do is nothing to these tests, and takes seconds to find out."""
    monkeypatch.setattr(engine_benchmark, "measure_peaks", lambda *_: MachinePeaks(1e9, 1e9))


def over_blocks_of(folder: Path, dtype: DType, kv_format: KvFormat) -> KvQuality:
    """Decode in float32 over blocks that lie token by token, those of another kind converted."""
    files = locate_model(str(folder))
    kinds = [
        prepare(files, dtype=one, num_threads=1, block_size=8, kv_format=form)
        for one, form in ((dtype, kv_format), (DType.FLOAT32, KvFormat.TOKEN_MAJOR))
    ]
    text = torch.arange(32) * 7 % 90
    alone, _, mixed = measure_kinds(kinds[0], kinds[1], [text])
    assert (alone.logit_error, alone.same_choice) == (0.0, 1.0)
    return mixed


def test_another_order_of_the_elements_loses_nothing(tiny_model: Callable[..., Path]) -> None:
    mixed = over_blocks_of(tiny_model("llama"), DType.FLOAT32, KvFormat.INTERLEAVED)
    assert mixed.bytes_share == 1.0
    assert mixed.logit_error < 1e-4


def test_another_element_type_loses_what_it_rounds_away(tiny_model: Callable[..., Path]) -> None:
    mixed = over_blocks_of(tiny_model("llama"), DType.BFLOAT16, KvFormat.TOKEN_MAJOR)
    assert mixed.bytes_share == 0.5
    assert 1e-4 < mixed.logit_error < 0.1


def test_words_that_are_no_kind_are_refused(tiny_model: Callable[..., Path]) -> None:
    command = ["bench", "kv-quality", str(tiny_model("llama")), "--tokens", "128", "--decode-kind", "float64"]
    ran = CliRunner().invoke(main, command)
    assert ran.exit_code != 0
    assert "'float64' is no part of a kind of instance" in ran.output + str(ran.exception)
