"""``disagg bench kv-quality``: what coded hand-overs cost in accuracy."""

import click
import msgspec

from disagg.base.config import DType
from disagg.cli.values import Count, Name


@click.command("kv-quality")
@click.argument("model", required=False)
@click.option("--dtype", type=Name([one.value for one in DType]), default=DType.BFLOAT16.value, show_default=True)
@click.option("--threads", type=Count(min=1), default=1, show_default=True, help="Threads.")
@click.option("--texts", type=Count(min=1), default=8, show_default=True, help="Pieces of text.")
@click.option(
    "--tokens", type=Count(min=128), default=1024, show_default=True, help="Of each, half of them handed over."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each coding.")
def kv_quality(model: str | None, dtype: str, threads: int, texts: int, tokens: int, as_json: bool) -> None:
    """Compare answers of MODEL over KV blocks that travelled as int8 with those over the blocks as they are.

    Text is the reference manual that Python carries. The first half of each piece is computed, its KV blocks are coded
    and decoded, and the second half is read over them. Every way to share scales is tried; hand-overs use K by channel
    and V by token.
    """
    from rich.console import Console
    from rich.table import Table

    from disagg.cache.layout import KvFormat
    from disagg.engine.benchmark.engine_benchmark import prepare
    from disagg.engine.benchmark.kv_quality import measure_quality, texts_of
    from disagg.models.locate import locate_model

    files = locate_model(model)
    ready = prepare(files, dtype=DType(dtype), num_threads=threads, block_size=64, kv_format=KvFormat.TOKEN_MAJOR)
    table = Table(title=f"{ready.name}, {dtype}: {texts} texts of {tokens} tokens, the first half handed over")
    for heading in ("form", "bytes", "logits off by", "at most", "same choice", "perplexity"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for one in measure_quality(ready, texts_of(files, texts, tokens)):
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
