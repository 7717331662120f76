"""``disagg bench transfer``: how fast KV blocks are handed over on this machine, and what the control path adds."""

from typing import TYPE_CHECKING

import click
import msgspec

from disagg.base.config import DType
from disagg.cli.values import Count, Name

if TYPE_CHECKING:
    from disagg.bench.client.hand_over_times import HandOverTimes
    from disagg.cache.layout import KvLayout
    from disagg.transfer.benchmark.transfer_benchmark import TransferFigure

NUM_TIMES_IN_POOL = 8
"""The pools are so many times as large as a read, which then finds nothing of itself in the cache."""


@click.command()
@click.argument("model", required=False)
@click.option("--tokens", type=Count(min=1), default=2176, show_default=True, help="Of one hand-over.")
@click.option("--dtype", type=Name([one.value for one in DType]), default=DType.BFLOAT16.value, show_default=True)
@click.option("--block-size", type=Count(min=2), default=64, show_default=True, help="Tokens of a KV block.")
@click.option("--streams", type=Count(min=1, max=64), default=2, show_default=True, help="TCP connections.")
@click.option("--reads", type=Count(min=1), default=15, show_default=True, help="Of which the median counts.")
@click.option("--cpu-time", is_flag=True, help="The reader's CPU time in place of wall time: for a busy machine.")
@click.option("--url", help="A running server: time its whole hand-overs instead, control path and bytes.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of that server.")
@click.option("--requests", type=Count(min=1), default=100, show_default=True, help="To that server, in turn.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each kind of read.")
def transfer(
    model: str | None,
    tokens: int,
    dtype: str,
    block_size: int,
    streams: int,
    reads: int,
    cpu_time: bool,
    url: str | None,
    api_key: str | None,
    requests: int,
    as_json: bool,
) -> None:
    """Time the hand-over of KV blocks of MODEL between two processes, over each link, beside its limit.

    The limit of shared memory, and of NIXL where it is installed, is a plain copy out of the other process's memory,
    that of TCP a socket that receives as many bytes into one buffer. Reads are of neighbouring blocks, and of scattered
    ones: a piece for each layer of each block, about 1,000 for the default model and length.

    With --url nothing is read here: prompts of --tokens tokens are sent to a server, which tells how long each of its
    hand-overs took from the first token until the decode instance knew of the blocks, and from there until it had them.
    """
    if url is not None:
        _print_hand_overs(url, api_key, requests, tokens, as_json=as_json)
        return
    from disagg.transfer.benchmark.transfer_benchmark import TransferBenchmark

    layout = _layout(model, DType(dtype), block_size, tokens)
    num_blocks = layout.num_blocks // NUM_TIMES_IN_POOL
    figures = []
    with TransferBenchmark(layout, num_blocks, reads, streams, counts_cpu=cpu_time) as benchmark:
        for figure in benchmark.measure():
            figures.append(figure)
            if as_json:
                row = {**msgspec.to_builtins(figure), "share": figure.share}
                click.echo(msgspec.json.encode(row).decode())
        digest = benchmark.digest_bytes_per_s()
        encode, decode = benchmark.coding_bytes_per_s()
        convert, resize = benchmark.conversion_bytes_per_s(), benchmark.resize_bytes_per_s()
    ends = {
        "digest_bytes_per_s": digest,
        "encode_bytes_per_s": encode,
        "decode_bytes_per_s": decode,
        "convert_bytes_per_s": convert,
        "resize_bytes_per_s": resize,
    }
    if as_json:
        click.echo(msgspec.json.encode(ends).decode())
    else:
        _print_table(figures, tokens, ends)


def _print_hand_overs(url: str, api_key: str | None, num_requests: int, tokens: int, *, as_json: bool) -> None:
    from disagg.bench.client.hand_over_times import measure_hand_overs
    from disagg.bench.client.load_plan import Server

    times = measure_hand_overs(Server(url, api_key=api_key), num_requests, tokens)
    if as_json:
        row = {**msgspec.to_builtins(times), "control_share": times.control_share}
        click.echo(msgspec.json.encode(row).decode())
    else:
        click.echo(_words(times))


def _words(times: "HandOverTimes") -> str:
    control, moved, ratio = times.control_s, times.bytes_s, times.gap_ratio
    return (
        f"{times.num_hand_overs} hand-overs of {times.num_tokens} tokens, median and 99th percentile\n"
        f"  control path  {control.p50 * 1e3:8.2f} {control.p99 * 1e3:8.2f} ms, {times.control_share:.0%} of the two\n"
        f"  bytes         {moved.p50 * 1e3:8.2f} {moved.p99 * 1e3:8.2f} ms that were left when the prefill had ended\n"
        f"  second token  {ratio.p50:8.2f} {ratio.p99:8.2f} times as late as those after it"
    )


def _layout(model: str | None, dtype: DType, block_size: int, tokens: int) -> "KvLayout":
    from disagg.cache.layout import KvDtype, KvFormat, KvLayout
    from disagg.models.locate import load_config, locate_model

    config = load_config(locate_model(model))
    return KvLayout(
        num_layers=config.num_layers,
        num_blocks=NUM_TIMES_IN_POOL * -(-tokens // block_size),
        num_kv_heads=config.num_kv_heads,
        block_size=block_size,
        head_dim=config.head_dim,
        dtype=KvDtype(dtype.value),
        format=KvFormat.INTERLEAVED,
    )


def _print_table(figures: list["TransferFigure"], tokens: int, ends: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    num_bytes = figures[0].num_bytes
    table = Table(title=f"hand-over of {tokens} tokens, {num_bytes / 1e6:.1f} MB")
    for heading in ("link", "form", "blocks", "pieces", "digests", "ms", "GB/s", "limit", "share"):
        table.add_column(heading, justify="left" if heading in ("link", "form", "blocks", "digests") else "right")
    for figure in figures:
        table.add_row(
            figure.link.value,
            figure.codec.value,
            figure.pieces.value,
            str(figure.num_pieces),
            "checked" if figure.digests else "off",
            f"{num_bytes / figure.bytes_per_s * 1e3:.2f}",
            f"{figure.bytes_per_s / 1e9:.1f}",
            f"{figure.limit_bytes_per_s / 1e9:.1f}",
            f"{figure.share:.2f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"The source makes digests at {ends['digest_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"{num_bytes / ends['digest_bytes_per_s'] * 1e3:.2f} ms for this hand-over, once. int8 is coded at "
        f"{ends['encode_bytes_per_s'] / 1e9:.1f} GB/s and decoded at {ends['decode_bytes_per_s'] / 1e9:.1f}. Blocks in "
        f"another order of the elements are converted at {ends['convert_bytes_per_s'] / 1e9:.1f}, those of twice the "
        f"size at {ends['resize_bytes_per_s'] / 1e9:.1f}."
    )
