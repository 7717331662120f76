"""``disagg models``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.units import format_bytes

if TYPE_CHECKING:
    from disagg.models.listing import ModelListing


@click.command()
@click.argument("named", metavar="[MODEL]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(named: tuple[str, ...], as_json: bool) -> None:
    """List what can be loaded without a download: the default model and the hub's cache.

    With MODELs, say of each what it is, or why it cannot be loaded: then the exit status is 2. "Its KV" is the memory
    of the KV blocks of one sequence of the whole context, in 16 bits an element.
    """
    from disagg.models.listing import describe_model, list_models

    listings = [describe_model(model) for model in named] if named else list_models()
    if as_json:
        click.echo(msgspec.json.encode(listings, enc_hook=str))
    else:
        _print_table(listings)
    problems = [f"{listing.name}: {listing.problem}" for listing in listings if listing.problem]
    if named and problems:
        raise ConfigurationError("; ".join(problems))


def _print_table(listings: Sequence["ModelListing"]) -> None:
    def row(listing: "ModelListing") -> tuple[str, ...]:
        parameters = "" if listing.num_parameters is None else f"{listing.num_parameters / 1e6:,.0f} M"
        context = "" if listing.max_position_embeddings is None else str(listing.max_position_embeddings)
        kv = "" if listing.kv_bytes is None else format_bytes(listing.kv_bytes)
        return (listing.name, listing.architecture or "", parameters, context, kv, format_bytes(listing.num_bytes))

    rows = [("model", "architecture", "parameters", "context", "its KV", "on disk"), *map(row, listings)]
    widths = [max(len(line[column]) for line in rows) for column in range(len(rows[0]))]
    problems = ["", *(listing.problem or "" for listing in listings)]
    for line, problem in zip(rows, problems, strict=True):
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo(f"{cells}  {problem}".rstrip())
    click.echo("\nAlso: any Hugging Face folder, GGUF file or hub id, as in: disagg serve PATH")
