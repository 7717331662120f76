"""How far predicted step times are from what others measured on GPUs: operator tables and rooflines, by source.

    python benchmarks/silicon.py [FOLDER]

FOLDER holds ``aiconfigurator/``, from whose tables is predicted, and what is compared with: whole steps of Llama-2-70B
under vLLM (``splitwise-sim/``), matrix products (``vidur/``) and attention (``frontier/``), measured by other people on
other machines. Prints the signed and the absolute error, each the median over the measured points.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from disagg.costs.devices import DeviceSheet, find_device
from disagg.costs.latency import LatencyModel, StepShape
from disagg.costs.roofline import RooflinePlatform
from disagg.costs.sheet_platform import SheetPlatform
from disagg.costs.tables import OperatorTables, TablePlatform
from disagg.models.known_shapes import KNOWN_SHAPES
from disagg.models.shape import ModelShape

FOLDER = Path("../shared/data/silicon")
GPUS = {"a100": "a100_sxm", "h100": "h100_sxm"}


@dataclass(frozen=True)
class Point:
    """One measurement and its predictions, in seconds, for a group of similar ones."""

    group: str
    measured_s: float
    tables_s: float
    roofline_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    folder: Path = parser.parse_args().folder
    tables = {
        gpu: OperatorTables.read(folder / "aiconfigurator", prefix, find_device(prefix.replace("_", "-")))
        for gpu, prefix in GPUS.items()
    }
    console = Console(width=120)
    console.print(report("Whole steps of Llama-2-70B, Splitwise's vLLM", list(splitwise(folder, tables))))
    console.print(report("Matrix products of one layer, Vidur", list(vidur(folder, tables))))
    console.print(report("Attention of one layer, 32 heads, Frontier's A800", list(frontier(folder, tables["a100"]))))


def report(title: str, points: Sequence[Point]) -> Table:
    """Return a row for each group of points."""
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.group].append(point)
    table = Table(title=title, title_justify="left")
    table.add_column("measured")
    for heading in ("points", "median", "tables: error", "absolute", "missing", "roofline: error", "absolute"):
        table.add_column(heading, justify="right")
    for group, members in groups.items():
        by_tables = [point.tables_s / point.measured_s - 1 for point in members]
        by_roofline = [point.roofline_s / point.measured_s - 1 for point in members]
        table.add_row(
            group,
            str(len(members)),
            _ms(point.measured_s for point in members),
            *_errors(by_tables),
            _ms(point.measured_s - point.tables_s for point in members),
            *_errors(by_roofline),
        )
    return table


def _ms(seconds: Iterator[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3g} ms"


def _errors(errors: Sequence[float]) -> tuple[str, str]:
    return f"{100 * statistics.median(errors):+.0f}%", f"{100 * statistics.median(map(abs, errors)):.0f}%"


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from csv.DictReader(lines)


# Whole steps ------------------------------------------------------------------------------------------------------


def splitwise(folder: Path, tables: dict[str, OperatorTables]) -> Iterator[Point]:
    """Yield the first step and the mean later step of each sweep: prompts, then batches of decodes."""
    config = KNOWN_SHAPES["llama-2-70b"]
    for row in _rows(folder / "splitwise-sim" / "perf_model.csv"):
        gpu, tensor = row["hardware"].removesuffix("-80gb"), int(row["tensor_parallel"])
        if row["model"] != "llama2-70b" or gpu not in tables:
            continue
        prompt, batch, answer = (int(row[name]) for name in ("prompt_size", "batch_size", "token_size"))
        models = _models(tables[gpu], config, tensor)
        name = f"{gpu} tp{tensor}"
        if answer == 128:
            shape = StepShape()
            for _ in range(batch):
                shape.add_prefill(0, prompt)
            yield _step(f"{name} prefill", float(row["prompt_time"]), models, shape)
        context = batch * (prompt + answer // 2)
        shape = StepShape(num_decodes=batch, decode_context=context, num_samples=batch)
        yield _step(f"{name} decode", float(row["token_time"]), models, shape)


def _models(tables: OperatorTables, config: ModelShape, tensor: int) -> tuple[LatencyModel, LatencyModel]:
    platforms: tuple[SheetPlatform, ...] = (
        TablePlatform.on(tables, config, "llama-2-70b"),
        RooflinePlatform(config, tables.device, "llama-2-70b"),
    )
    by_tables, by_roofline = (platform.latency(tensor, 1) for platform in platforms)
    return by_tables, by_roofline


def _step(group: str, measured_ms: float, models: tuple[LatencyModel, LatencyModel], shape: StepShape) -> Point:
    by_tables, by_roofline = (sum(model.stage_times_s(shape)) for model in models)
    return Point(group, measured_ms / 1e3, by_tables, by_roofline)


# Operators --------------------------------------------------------------------------------------------------------


def vidur(folder: Path, tables: dict[str, OperatorTables]) -> Iterator[Point]:
    """Yield the four matrix products of a layer, each as one of the devices of an instance computes it."""
    for path in sorted((folder / "vidur").glob("*.mlp.csv")):
        gpu, model, *_ = path.name.split(".")
        table = tables[gpu]
        for row in _rows(path):
            num_tokens, tensor = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
            hidden, inner = int(row["n_embd"]), int(row["n_expanded_embd"]) // tensor
            heads, kv_heads = int(row["n_head"]) // tensor, max(1, int(row["n_kv_head"]) // tensor)
            head_dim = hidden // int(row["n_head"])
            widths = {
                "attn_pre_proj": ((heads + 2 * kv_heads) * head_dim, hidden),
                "attn_post_proj": (hidden, heads * head_dim),
                "mlp_up_proj": (2 * inner, hidden),
                "mlp_down_proj": (hidden, inner),
            }
            phase = "up to 64 rows" if num_tokens <= 64 else "more rows"
            for operator, (n, k) in widths.items():
                yield Point(
                    f"{gpu} {model}, {phase}",
                    float(row[f"time_stats.{operator}.median"]) / 1e3,
                    table.matmul.curve(n, k)(num_tokens),
                    _matmul_s(table.device, num_tokens, n * k),
                )


def _matmul_s(device: DeviceSheet, num_rows: int, num_weights: int) -> float:
    compute_s = 2 * num_rows * num_weights / (device.flops_per_s * device.matmul_share)
    return max(compute_s, 2 * num_weights / (device.memory_bytes_per_s * device.weights_share))


def frontier(folder: Path, table: OperatorTables) -> Iterator[Point]:
    """Yield prefill without a prefix, and decodes of batches, of Llama-2-7B: 32 query heads and 32 KV heads."""
    device, attention = table.device, table.attention
    prefill = attention.prefill_curve(32, 32)
    decode = attention.decode(32, 32)
    for row in _rows(folder / "frontier" / "a800.Llama-2-7b-hf.attention.csv"):
        batch, chunk, cached = (int(row[name]) for name in ("batch_size", "prefill_chunk_size", "kv_cache_size"))
        if row["is_prefill"] == "True" and not cached and chunk >= 256:
            flops = 4 * 32 * 128 * chunk * (chunk + 1) / 2
            measured_ms = float(row["time_stats.attn_prefill.median"])
            by_roofline = flops / (device.flops_per_s * device.attention_share)
            yield Point("prefill, 256 tokens and more", measured_ms / 1e3, prefill(chunk * chunk), by_roofline)
        elif row["is_prefill"] == "False" and batch * cached >= 1024:
            kv_bytes = 2 * 32 * 128 * 2 * batch * cached
            measured_ms = float(row["time_stats.attn_decode.median"])
            by_roofline = kv_bytes / (device.memory_bytes_per_s * device.kv_share)
            size = "up to" if batch * cached <= 16_384 else "more than"
            yield Point(f"decode, {size} 16,384 tokens", measured_ms / 1e3, decode(batch, cached), by_roofline)


if __name__ == "__main__":
    main()
