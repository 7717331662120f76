"""``disagg doctor``: how fast KV blocks get from prefill to decode instances, and whether that is what it could be."""

import time
from pathlib import Path
from typing import Final

import click
import msgspec

from disagg.base.errors import UnavailableError
from disagg.base.units import format_bytes
from disagg.cli.ctl_client import ControlClient
from disagg.cli.top import Seconds
from disagg.serve.api.views import LinkView

_POLL_S: Final = 0.05
_WARNED: Final = 1


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Server.")
@click.option("--api-key", envvar="DISAGG_API_KEY", show_envvar=True, help="Key of the server.")
@click.option("--timeout", "timeout_s", type=Seconds(), default="1min", show_default=True, help="How long to wait.")
@click.option("--json", "as_json", is_flag=True, help="One JSON line for each link.")
@click.option(
    "--update-profile",
    "profile",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write the slowest link into a profile (disagg profile), from which disagg plan and simulate read it, unless "
    "the link that the profile was fitted to is slower.",
)
@click.pass_context
def doctor(
    ctx: click.Context, url: str, api_key: str | None, timeout_s: float, as_json: bool, profile: Path | None
) -> None:
    """Measure each link of a running server from a prefill to a decode instance, beside what its hardware gives.

    The exit status is 1 when something is wrong with a link.
    """
    with ControlClient(url, api_key) as client:
        client.measure_links()
        links = _wait_for_figures(client, timeout_s)
    for link in links:
        click.echo(msgspec.json.encode(link).decode() if as_json else _words(link))
    if not links and not as_json:
        click.echo("no KV blocks travel: no prefill instance and one that goes on with its sequences are ready")
    if profile is not None:
        _update(profile, links)
    ctx.exit(_WARNED if any(link.warning for link in links) else 0)


def _wait_for_figures(client: ControlClient, timeout_s: float) -> list[LinkView]:
    """Return the links once all are measured; raise UnavailableError when that takes too long."""
    started_s = time.monotonic()
    while True:
        links = client.links()
        waiting = [f"{link.source} to {link.target}" for link in links if not link.is_measured]
        if not waiting:
            return links
        if time.monotonic() - started_s > timeout_s:
            raise UnavailableError(f"not measured in {timeout_s:g} s (--timeout): {', '.join(waiting)}")
        time.sleep(_POLL_S)


def _words(link: LinkView) -> str:
    ends = f"{link.source} to {link.target}"
    if not link.bytes_per_s:
        return f"{ends}: {link.warning}"
    of_limit = ""
    if link.limit_bytes_per_s:
        share = link.bytes_per_s / link.limit_bytes_per_s
        of_limit = f", {share:.0%} of {link.limit} ({format_bytes(link.limit_bytes_per_s)}/s)"
    told = (
        f"{ends}: {link.link} ({link.why}), {format_bytes(link.bytes_per_s)}/s, "
        f"{link.latency_s * 1e6:.0f} us to the first byte{of_limit}"
    )
    return f"{told}\n  warning: {link.warning}" if link.warning else told


def _update(path: Path, links: list[LinkView]) -> None:
    """Write the slowest link into a profile, unless the profile's is slower. Raises ConfigurationError for no profile.

    A profile's link is of whole hand-overs that were checked. A read that checks nothing is quicker over the same link:
    one that is not shows another link.
    """
    from disagg.costs.profile import load_profile, save_profile

    known = [link for link in links if link.bytes_per_s]
    if not known:
        raise UnavailableError(f"no link was measured: {path} stays as it is")
    slowest = min(known, key=lambda link: link.bytes_per_s)
    profile = load_profile(path)
    if slowest.bytes_per_s >= profile.link_bytes_per_s:
        click.echo(
            f"{path} stays as it is: the {format_bytes(profile.link_bytes_per_s)}/s in it are of hand-overs whose "
            "blocks were checked, and no link is slower",
            err=True,
        )
        return
    latency_s = max(slowest.latency_s, profile.link_latency_s)
    changed = {"link_bytes_per_s": slowest.bytes_per_s, "link_latency_s": latency_s}
    save_profile(msgspec.structs.replace(profile, **changed), path)
