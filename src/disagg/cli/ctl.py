"""``disagg ctl``: an operator's commands on a running server."""

import sys
import time
from collections.abc import Callable
from typing import Final

import click

from disagg.base.errors import UnavailableError
from disagg.base.request import Role
from disagg.cli.ctl_client import ControlClient
from disagg.cli.top import Seconds
from disagg.cli.values import CommandGroup, Name
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.scaling import ScalingView
from disagg.serve.api.views import CommandReply, InstanceView

_POLL_S: Final = 0.05
_COLUMNS: Final = ("instance", "role", "state", "pid", "sequences", "KV use")

Condition = Callable[[InstanceView | None], str]
"""Takes an instance, None when there is none of its name; returns what has come true, or nothing yet."""


@click.group(cls=CommandGroup)
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
@click.option(
    "--timeout", "timeout_s", type=Seconds(), default="5min", show_default=True, help="How long to wait for the end."
)
@click.option("--no-wait", is_flag=True, help="Return once the command has begun.")
@click.pass_context
def ctl(ctx: click.Context, url: str, api_key: str | None, timeout_s: float, no_wait: bool) -> None:
    """Change a running server: no request fails, and answers go on.

    A command waits until what it asked for has come true.
    """
    client = ctx.with_resource(ControlClient(url, api_key))
    ctx.obj = Control(client, 0.0 if no_wait else timeout_s)


class Control:
    """Gives commands, and waits for their end where that is wanted."""

    def __init__(self, client: ControlClient, timeout_s: float) -> None:
        self.client = client
        self._timeout_s = timeout_s

    def give(self, instance: str | None, verb: str, body: dict[str, object], condition: Condition) -> None:
        """Give a command to an instance, or to the server; raise UnavailableError when it does not end in time."""
        reply: CommandReply = self.client.command(instance, verb, body)
        click.echo(reply.message)
        started_s = time.monotonic()
        while self._timeout_s:
            if words := condition(self.client.instance(reply.instance)):
                click.echo(f"{reply.instance} {words} after {time.monotonic() - started_s:.2f} s")
                return
            if time.monotonic() - started_s > self._timeout_s:
                raise UnavailableError(
                    f"{reply.instance} did not get there in {self._timeout_s:g} s (--timeout); it goes on: "
                    "look with disagg ctl status"
                )
            time.sleep(_POLL_S)


@ctl.command()
@click.pass_obj
def status(control: Control) -> None:
    """Show the instances, and what autoscaling sees of them."""
    state = control.client.state()
    rows = [_COLUMNS, *(_row(one) for one in state.instances)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")
    for view in state.scaling:
        sys.stdout.write(_scaling(view) + "\n")
    if state.plan:
        sys.stdout.write(f"re-planning: {state.plan}\n")


@ctl.command()
@click.argument("instance")
@click.option("--undo", is_flag=True, help="Give it requests again.")
@click.option("--force", is_flag=True, help="Also where no request can be served after it.")
@click.pass_obj
def drain(control: Control, instance: str, undo: bool, force: bool) -> None:
    """Give INSTANCE no new requests, and its running answers to others."""
    condition = _is_ready if undo else _has_drained
    control.give(instance, "drain", {"undo": undo, "force": force}, condition)


@ctl.command()
@click.argument("instance")
@click.option("--force", is_flag=True, help="Also where no request can be served after it.")
@click.pass_obj
def remove(control: Control, instance: str, force: bool) -> None:
    """Drain INSTANCE, then end its process."""
    control.give(instance, "remove", {"force": force}, lambda one: "has left" if one is None else "")


@ctl.command()
@click.option("--role", type=Name([role.value for role in Role]), required=True, help="What it is for.")
@click.pass_obj
def add(control: Control, role: str) -> None:
    """Start one more instance."""
    control.give(None, "add", {"role": role}, _is_ready)


@ctl.command()
@click.argument("instance")
@click.option("--role", type=Name([role.value for role in Role]), required=True, help="Its role from now on.")
@click.option("--force", is_flag=True, help="Also where no request can be served after it.")
@click.pass_obj
def flip(control: Control, instance: str, role: str, force: bool) -> None:
    """Give INSTANCE another role, in place: nothing is loaded again, and its KV cache stays."""

    def has_flipped(one: InstanceView | None) -> str:
        return f"is a {role} instance" if one is not None and one.role == role else ""

    control.give(instance, "flip", {"role": role, "force": force}, has_flipped)


@ctl.command()
@click.pass_obj
def restart(control: Control) -> None:
    """Start the routers anew (--routers), one after the other, while the instances and their KV caches live on."""
    click.echo(control.client.restart().message)


def _is_ready(one: InstanceView | None) -> str:
    if one is not None and one.state == InstanceState.GONE.value:
        raise UnavailableError(f"{one.instance} did not start: {one.detail}")
    return "takes requests" if one is not None and one.state == InstanceState.READY.value else ""


def _has_drained(one: InstanceView | None) -> str:
    return "has drained" if one is not None and one.num_sequences == 0 else ""


def _scaling(view: ScalingView) -> str:
    """Return one role in words: its number and range, what is predicted, and what was changed last."""
    predicted = ", ".join(
        f"{attainment:.0%} with {count}"
        for attainment, count in ((view.attainment, view.count), (view.attainment_with_fewer, view.count - 1))
        if attainment is not None
    )
    told = f"; predicted attainment {predicted}" if predicted else "; nothing can be predicted yet"
    last = f"; last change: {view.last_change}" if view.last_change else ""
    return f"autoscaling: {view.count} {view.role} of {view.fewest}..{view.most}{told}{last}"


def _row(one: InstanceView) -> tuple[str, ...]:
    state = "leaving" if one.is_leaving else one.state
    return (
        one.instance,
        one.role,
        state + (f" ({one.detail})" if one.detail else ""),
        "-" if one.pid is None else str(one.pid),
        str(one.num_sequences),
        f"{one.kv_usage:.0%}",
    )
