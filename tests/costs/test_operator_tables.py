"""Operator tables: interpolation, what lies outside of them, and a whole model against a measured engine."""

from pathlib import Path

import msgspec
import pytest
from test_roofline import DECODE, PREFILL, config

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import find_device
from disagg.costs.latency import StepShape
from disagg.costs.operator_tables import GEMM_COLUMNS, AllReduceTable, AttentionTable, Curve, MatmulTable, read_rows
from disagg.costs.published import PublishedPlatform
from disagg.costs.tables import OperatorTables, TablePlatform

Row = dict[str, str]


def row(**values: float | str) -> Row:
    return {name: str(value) for name, value in values.items()}


def matmuls() -> list[Row]:
    """1 ms for each 1,000 weights, and as much again for each row."""
    sizes = (10, 100, 1000)
    return [row(m=m, n=n, k=k, latency_ms=n * k / 1000 * (1 + m)) for m in (1, 10, 100) for n in sizes for k in sizes]


def test_a_curve_is_exact_for_power_laws_and_goes_on_with_its_last_slope() -> None:
    curve = Curve({x: 3 * x**2 for x in (1.0, 10.0, 100.0)})
    assert curve(37) == pytest.approx(3 * 37**2)
    assert curve(1000) == pytest.approx(3e6)
    assert curve(0.1) == pytest.approx(3)
    assert curve(0) == 0
    predicted, measured = curve.hold_out_error()
    assert predicted == pytest.approx(measured)


def test_one_point_is_no_curve() -> None:
    with pytest.raises(ConfigurationError, match="two measured points"):
        Curve({1.0: 1.0})


def test_matrix_products_between_and_beyond_the_measured_sizes() -> None:
    table = MatmulTable(matmuls())
    assert table.curve(100, 1000)(10) == pytest.approx(1.1)
    assert table.curve(50, 500)(10) == pytest.approx(25 * 11e-3)
    assert table.curve(4000, 1000)(10) == pytest.approx(44.0)
    assert table.error().num_samples == 9


def test_attention_of_more_heads_than_measured_counts_as_more_sequences() -> None:
    prefill = [
        row(batch_size=1, isl=isl, step=0, num_heads=8, num_key_value_heads=8, latency_ms=isl**2 / 1e6)
        for isl in (10, 100, 1000)
    ]
    decode = [
        row(batch_size=b, isl=1, step=s, num_heads=8, num_key_value_heads=8, latency_ms=b * (s + 1) / 1e5)
        for b in (1, 4, 16)
        for s in (99, 999)
    ]
    table = AttentionTable(prefill, decode)
    assert table.prefill_curve(16, 16)(500**2) == pytest.approx(2 * 0.25e-3)
    assert table.decode(16, 16)(2, 500) == pytest.approx(4 * 500 / 1e8)


def test_an_unmeasured_tensor_parallelism_is_refused() -> None:
    rows = [row(num_gpus=2, message_size_elements=size, latency_ms=size / 1e3, backend="x") for size in (10, 20)]
    with pytest.raises(ConfigurationError, match="over 3 devices, only over 2"):
        AllReduceTable(rows).curve(3)


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"must hold one file a100_sxm\.\*gemm.*found none"):
        OperatorTables.read(tmp_path, "a100_sxm", find_device("a100-sxm"))


@pytest.fixture
def platform(reference_data: Path) -> TablePlatform:
    folder = reference_data / "silicon" / "aiconfigurator"
    return TablePlatform.on(OperatorTables.read(folder, "a100_sxm", find_device("a100-sxm")), config(), "13b")


def test_the_tables_say_how_well_they_interpolate(platform: TablePlatform) -> None:
    errors = platform.tables.errors()
    assert errors["matmul"].median < 0.06
    assert errors["attention"].median < 0.04


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
@pytest.mark.parametrize("shape", [PREFILL, DECODE])
def test_the_sum_of_operators_is_less_than_an_engine_takes_but_not_by_much(
    tensor_parallel: int, shape: StepShape, platform: TablePlatform
) -> None:
    """Kernels alone against DistServe's fit before scaling, whose host work grows in proportion as the devices do."""
    (kernels_s,) = platform.latency(tensor_parallel, 1).stage_times_s(shape)
    engine = PublishedPlatform("distserve", "facebook/opt-13b", prefill_factor=1)
    (engine_s,) = engine.latency(tensor_parallel, 1).stage_times_s(shape)
    assert engine_s - 0.020 < kernels_s < engine_s


def test_a_pipeline_has_the_layers_of_one_instance_and_sends(platform: TablePlatform) -> None:
    (whole,) = platform.latency(1, 1).stage_times_s(DECODE)
    stages = platform.latency(1, 2).stage_times_s(DECODE)
    assert len(stages) == 2
    assert whole < sum(stages) < 1.02 * whole


def test_other_heads_are_refused(platform: TablePlatform) -> None:
    small = msgspec.structs.replace(config(), head_dim=64)
    with pytest.raises(ConfigurationError, match="heads of 128"):
        TablePlatform.on(platform.tables, small, "small")


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for name in ("g.a.gemm_bf16.csv", "g.b.gemm_bf16.csv"):
        (tmp_path / name).write_text("m,n,k,latency_ms\n")
    with pytest.raises(ConfigurationError, match=r"g\.a\.gemm_bf16\.csv, g\.b"):
        read_rows(tmp_path, "g.*gemm_bf16*.csv")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300", "", "fast"])
def test_a_time_that_cannot_be_is_refused_with_its_line(value: str, tmp_path: Path) -> None:
    (tmp_path / "g.gemm_bf16.csv").write_text(f"m,n,k,latency_ms\n1,2,3,0.5\n1,2,3,{value}\n")
    with pytest.raises(ConfigurationError, match=r"line 3: .*latency_ms"):
        read_rows(tmp_path, "g.gemm_bf16.csv", GEMM_COLUMNS)


@pytest.mark.parametrize(
    "text", ["m,n,latency_ms\n1,2,0.5\n", "m,n,k,latency_ms\n1,2\n", "m,n,k,latency_ms\n0,2,3,0.5\n"]
)
def test_a_table_that_lacks_sizes_is_refused_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "g.gemm_bf16.csv").write_text(text)
    with pytest.raises(ConfigurationError, match="line 2: "):
        read_rows(tmp_path, "g.gemm_bf16.csv", GEMM_COLUMNS)


@pytest.mark.parametrize("content", [b"", b"m,n,k,latency_ms\n", b"\xff\xfe"])
def test_a_table_without_measurements_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "g.gemm_bf16.csv").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"g\.gemm_bf16\.csv"):
        read_rows(tmp_path, "g.gemm_bf16.csv", GEMM_COLUMNS)
