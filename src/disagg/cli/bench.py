"""``disagg bench``: measuring. Each sub-command of another module is imported when it is called."""

import importlib
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

from disagg.base.config import DType, Quantization
from disagg.cli.values import CommandGroup, Count, Name

if TYPE_CHECKING:
    from disagg.engine.benchmark.cases import StepTime
    from disagg.engine.benchmark.engine_benchmark import EngineBenchmark


COMMANDS: Final = {
    "serve": ("disagg.cli.bench_serve", "Send a workload to a server and measure what comes back."),
    "goodput": ("disagg.cli.bench_goodput", "Search the highest rate at which a server keeps its objectives."),
    "transfer": ("disagg.cli.bench_transfer", "Time the hand-over of KV blocks over each link."),
    "kv-quality": ("disagg.cli.bench_kv_quality", "Compare answers over coded KV blocks with those over raw ones."),
    "compare": ("disagg.cli.bench_compare", "Send the same requests to several servers on the same cores."),
    "report": ("disagg.cli.bench_report", "Draw saved results as one page."),
}
"""Name, module (which has a command of that name) and one line of help."""


class BenchCommands(CommandGroup):
    """A group some of whose commands are imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they are helpful."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        lines = [(name, line) for name, (_, line) in COMMANDS.items()]
        lines += [(name, command.get_short_help_str(100)) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(lines)


@click.group(cls=BenchCommands)
def bench() -> None:
    """Measure servers, and the engine on this machine."""


@bench.command()
@click.argument("model", required=False)
@click.option("--threads", type=Count(min=1), multiple=True, default=(1,), help="Threads; may be repeated.")
@click.option("--dtype", type=Name([one.value for one in DType]), default=DType.BFLOAT16.value)
@click.option("--quantization", type=Name([one.value for one in Quantization]), help="Of the weight matrices.")
@click.option("--block-size", type=Count(min=2), default=64, show_default=True, help="Tokens of a KV block.")
@click.option("--kernels", type=Name(["native", "torch"]), help="Kernel backend  [default: the best there is]")
@click.option("--quick", is_flag=True, help="A few cases only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each step.")
def engine(model: str | None, threads: tuple[int, ...], as_json: bool, **options: Any) -> None:
    """Time prefill and decode steps of MODEL against this machine's limits.

    The share is the higher of two floors, operations / matrix-product peak and bytes / read bandwidth, over the
    measured time: 1 is the limit. Both limits are measured in the same run with the same threads. "In turn" is the
    share of the sum of two such floors, that of the products with weights and that of attention.
    """
    for num_threads in threads:
        ready, steps = _measure(model, num_threads, options)
        if as_json:
            for step in steps:
                shares = {"share": step.share, "share_in_turn": step.share_in_turn, "limit": step.limit.value}
                peaks = msgspec.to_builtins(ready.peaks)
                row = {
                    "threads": num_threads,
                    "weight_bytes": ready.weight_bytes,
                    **shares,
                    **msgspec.to_builtins(step),
                    "peaks": peaks,
                }
                click.echo(msgspec.json.encode(row).decode())
        else:
            _print_table(ready, steps, num_threads)


def _measure(
    model: str | None, num_threads: int, options: dict[str, Any]
) -> tuple["EngineBenchmark", list["StepTime"]]:
    from rich.console import Console
    from rich.progress import Progress

    from disagg.engine.benchmark.cases import standard_cases
    from disagg.engine.benchmark.engine_benchmark import prepare
    from disagg.models.locate import locate_model

    files = locate_model(model)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        loading = progress.add_task("loading", total=1.0)
        ready = prepare(
            files,
            dtype=DType(options["dtype"]),
            quantization=Quantization(options["quantization"]) if options["quantization"] else None,
            num_threads=num_threads,
            block_size=options["block_size"],
            kernel_backend=options["kernels"],
            progress=lambda fraction: progress.update(loading, completed=fraction),
        )
        cases = standard_cases(ready.decoder.max_model_len, options["quick"])
        measuring = progress.add_task("measuring", total=len(cases))
        steps = []
        for step in ready.measure(cases):
            steps.append(step)
            progress.advance(measuring)
    return ready, steps


def _print_table(ready: "EngineBenchmark", steps: list["StepTime"], num_threads: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from disagg.base.units import format_bytes

    peaks = ready.peaks
    table = Table(
        title=f"{ready.name}, {ready.dtype}, {ready.backend.name} kernels, {num_threads} thread(s), "
        f"weights {format_bytes(ready.weight_bytes)}: "
        f"reads {peaks.read_bandwidth / 1e9:.1f} GB/s, matrix product {peaks.gemm_flops / 1e9:.0f} GFLOP/s"
    )
    for heading in ("phase", "batch", "tokens", "context", "ms", "share", "in turn", "floor"):
        table.add_column(heading, justify="left" if heading in ("phase", "floor") else "right")
    for step in steps:
        case = step.case
        table.add_row(
            case.phase.value,
            str(case.batch),
            str(case.new_tokens * case.batch),
            str(case.context),
            f"{step.time_s * 1e3:.2f}",
            f"{step.share:.2f}",
            f"{step.share_in_turn:.2f}",
            step.limit.value,
        )
    Console().print(table)
