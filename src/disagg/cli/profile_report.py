"""What ``disagg profile`` prints: how well the fit predicts what it was not fitted to, and where it does not."""

from collections.abc import Sequence

import click
import msgspec
from rich.console import Console
from rich.table import Table

from disagg.calibration.profile_summary import ProfileSummary, StepError, ThreadsSummary


def print_summary(summary: ProfileSummary, as_json: bool) -> None:
    """Print for people, or as one line of JSON."""
    if as_json:
        click.echo(msgspec.json.encode(summary).decode())
        return
    console = Console()
    console.print(f"{summary.model}, {summary.dtype}, on {summary.device}")
    for one in summary.by_threads:
        _print_threads(one, console)
    digests = summary.digest_bytes_per_s
    console.print(
        f"KV pull {summary.link_bytes_per_s / 1e9:.1f} GB/s after {summary.link_latency_s * 1e3:.2f} ms; "
        f"{'' if digests is None else f'its offer {digests / 1e9:.1f} GB/s beside two messages; '}"
        f"accepting {summary.accept_s * 1e3:.2f} ms, a message {summary.message_s * 1e3:.2f} ms, "
        f"delivery {summary.deliver_s * 1e3:.2f} ms"
    )
    serving = summary.serving
    if serving is not None:
        console.print(
            f"serving takes {serving.step_s * 1e3:.2f} ms a step and {serving.token_s * 1e6:.0f} us a token, "
            f"{serving.request_s * 1e3:.1f} ms a request and {serving.prompt_token_s * 1e6:.1f} us a token of its "
            f"prompt from instances that use all {serving.num_cores} cores"
        )
    console.print(f"written to {summary.file}")


def _print_threads(one: ThreadsSummary, console: Console) -> None:
    threads = "" if one.num_threads is None else f"{one.num_threads} thread(s): "
    console.print(
        f"\n{threads}a lone decode {one.lone_decode_s * 1e3:.1f} ms, a prompt of 512 tokens {one.prompt_s * 1e3:.0f} "
        f"ms; {one.num_samples} samples"
    )
    error = one.held_out
    console.print(
        f"error on {error.num_samples} held-out steps: mean {error.mean:.1%}, median {error.median:.1%}, "
        f"P90 {error.p90:.1%}, max {error.maximum:.1%}"
    )
    console.print(_worst_table(one.worst))
    for cost in one.neighbours:
        console.print(
            f"a neighbour that computes {cost.activity.value} adds {cost.step_s * 1e3:.2f} ms a step, "
            f"{cost.token_s * 1e6:.1f} us a token, {cost.context_token_s * 1e9:.0f} ns a token of decode context: "
            f"{cost.lengthening:+.0%} over {cost.num_samples} steps, mean error {cost.error.mean:.1%} "
            f"({cost.error_in_the_mean.mean:.1%} without regard to memory bandwidth)"
        )
    if one.memory is not None:
        least, mean, most = (bandwidth / 1e9 for bandwidth in one.memory.together)
        console.print(
            f"the cores of one instance read {one.memory.alone / 1e9:.0f} GB/s from memory, those of two together "
            f"{mean:.0f}; at {least:.0f} a neighbour that decodes adds {one.memory.added_s[0] * 1e3:.1f} ms to a "
            f"lone decode, at {most:.0f} {one.memory.added_s[1] * 1e3:.1f} ms"
        )


def _worst_table(worst: Sequence[StepError]) -> Table:
    table = Table(title="where the fit is worst")
    for heading in ("prefills", "prompt tokens", "decodes", "their context", "measured ms", "predicted ms", "error"):
        table.add_column(heading, justify="right")
    for step in worst:
        table.add_row(
            str(step.num_prefills),
            str(step.num_prefill_tokens),
            str(step.num_decodes),
            f"{step.mean_decode_context:.0f}",
            f"{step.measured_s * 1e3:.1f}",
            f"{step.predicted_s * 1e3:.1f}",
            f"{step.error:+.1%}",
        )
    return table
