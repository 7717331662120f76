"""``disagg keys``."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--keys",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Where they are.  [default: ~/.config/disagg/keys]",
)
def keys(folder: Path | None) -> None:
    """Make what is missing of the keys with which hosts of one deployment know each other, and say what to copy.

    A server that listens for instances on other hosts (disagg serve --listen-instances) makes them too.
    """
    from disagg.serve.launch.key_files import default_folder, make_keys

    folder = folder or default_folder()
    made = make_keys(folder)
    click.echo(f"{'made keys' if made else 'keys are there'}: {folder}")
    click.echo("Every host whose instances join needs server.key and instance.key_secret, in its --keys folder:")
    click.echo(f"  scp {folder}/server.key {folder}/instance.key_secret OTHER-HOST:.config/disagg/keys/")
    click.echo("server.key_secret stays here. Whoever has instance.key_secret can join.")
