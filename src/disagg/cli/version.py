"""``disagg version``."""

import json
import platform

import click

import disagg


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def version(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        click.echo(json.dumps({"version": disagg.__version__, "python": platform.python_version()}))
    else:
        click.echo(disagg.__version__)
