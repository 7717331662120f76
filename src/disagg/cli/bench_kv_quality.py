"""``disagg bench kv-quality``: what coded hand-overs, and hand-overs between unequal instances, cost in accuracy."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click
import msgspec

from disagg.base.config import DType, Quantization
from disagg.base.errors import ConfigurationError
from disagg.cli.values import Count, Name

if TYPE_CHECKING:
    from disagg.engine.benchmark.engine_benchmark import EngineBenchmark
    from disagg.engine.benchmark.kv_quality import KvQuality
    from disagg.models.locate import ModelFiles

_DTYPES = {one.value: one for one in DType}
_KERNELS = ("native", "torch")


@click.command("kv-quality")
@click.argument("model", required=False)
@click.option("--dtype", type=Name(list(_DTYPES)), default=DType.BFLOAT16.value, show_default=True)
@click.option("--threads", type=Count(min=1), default=1, show_default=True, help="Threads.")
@click.option("--texts", type=Count(min=1), default=8, show_default=True, help="Pieces of text.")
@click.option(
    "--tokens", type=Count(min=128), default=1024, show_default=True, help="Of each, half of them handed over."
)
@click.option("--prefill-kind", help="Of unequal instances, such as native,float32 or torch,bfloat16,int8.")
@click.option("--decode-kind", help="The other one's; a part that is left out is --dtype, or the best kernels.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each coding.")
def kv_quality(
    model: str | None,
    dtype: str,
    threads: int,
    texts: int,
    tokens: int,
    prefill_kind: str | None,
    decode_kind: str | None,
    as_json: bool,
) -> None:
    """Compare answers of MODEL over KV blocks that travelled as int8 with those over the blocks as they are.

    Text is the reference manual that Python carries. The first half of each piece is computed, its KV blocks are coded
    and decoded, and the second half is read over them. Every way to share scales is tried; hand-overs use K by channel
    and V by token. With --prefill-kind or --decode-kind the first half is computed by one kind of instance, and its
    blocks are converted for the other.
    """
    from disagg.cache.layout import KvFormat
    from disagg.engine.benchmark.engine_benchmark import prepare
    from disagg.engine.benchmark.kv_quality import measure_kinds, measure_quality, texts_of
    from disagg.models.locate import locate_model

    files = locate_model(model)
    pieces = texts_of(files, texts, tokens)
    if prefill_kind is None and decode_kind is None:
        ready = prepare(files, dtype=DType(dtype), num_threads=threads, block_size=64, kv_format=KvFormat.TOKEN_MAJOR)
        title = f"{ready.name}, {dtype}"
        rows = measure_quality(ready, pieces)
    else:
        kinds = [_kind(files, kind or "", dtype, threads) for kind in (prefill_kind, decode_kind)]
        title = f"{kinds[0].name}, prefill {prefill_kind or dtype}, decode {decode_kind or dtype}"
        rows = measure_kinds(kinds[0], kinds[1], pieces)
    _show(rows, f"{title}: {texts} texts of {tokens} tokens, the first half handed over", as_json=as_json)


def _kind(files: "ModelFiles", kind: str, dtype: str, threads: int) -> "EngineBenchmark":
    """Return an instance of a kind; raise ConfigurationError for words that are none."""
    from disagg.engine.benchmark.engine_benchmark import prepare

    chosen, kernels, quantization = DType(dtype), None, None
    for word in filter(None, kind.split(",")):
        if word in _DTYPES:
            chosen = _DTYPES[word]
        elif word in _KERNELS:
            kernels = word
        elif word == Quantization.INT8.value:
            quantization = Quantization.INT8
        else:
            known = ", ".join([*_KERNELS, *_DTYPES, Quantization.INT8.value])
            raise ConfigurationError(f"{word!r} is no part of a kind of instance: use {known}")
    return prepare(
        files,
        dtype=chosen,
        quantization=quantization,
        num_threads=threads,
        block_size=64,
        kernel_backend=kernels,
    )


def _show(rows: "Iterator[KvQuality]", title: str, *, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for heading in ("form", "bytes", "logits off by", "at most", "same choice", "perplexity"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for one in rows:
        if as_json:
            click.echo(msgspec.json.encode(one).decode())
        table.add_row(
            one.coding,
            f"{one.bytes_share:.1%}",
            f"{one.logit_error:.2%}",
            f"{one.largest_error:.2f}",
            f"{one.same_choice:.1%}",
            f"{one.perplexity:.3f}",
        )
    if not as_json:
        Console().print(table)
