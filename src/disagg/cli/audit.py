"""``disagg audit``: whether every KV block of a running server is where the books say."""

import click
import msgspec

from disagg.cli.ctl_client import ControlClient
from disagg.serve.api.views import AuditView

_BROKEN = 1


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def audit(ctx: click.Context, url: str, api_key: str | None, as_json: bool) -> None:
    """Count the KV blocks of every instance of a running server, and name each that breaks the sum.

    All instances are asked at the same instant; each answers between two steps. The exit status is 1 when a block is
    not where the books say, or an instance does not answer.
    """
    with ControlClient(url, api_key) as client:
        found = client.audit()
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
    else:
        for one in found.instances:
            click.echo(_words(one))
        for fault in found.faults:
            click.echo(f"fault: {fault}")
        click.echo("every block is where the books say" if found.is_exact else "the books are not right")
    ctx.exit(0 if found.is_exact else _BROKEN)


def _words(one: AuditView) -> str:
    states = " + ".join(f"{count} {state}" for state, count in one.blocks.items())
    sums = f"{one.instance}: {one.total} blocks = {states}; {one.num_sequences} sequences, {one.num_leases} leases"
    return "\n".join([sums, *(f"  fault: {fault}" for fault in one.faults)])
