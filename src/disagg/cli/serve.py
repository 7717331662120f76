"""``disagg serve``."""

import logging
from pathlib import Path
from typing import Any

import click

from disagg.base.config import (
    MAX_INSTANCES,
    CacheSettings,
    ModelSettings,
    RouterSettings,
    SchedulerSettings,
    ServeSettings,
)
from disagg.base.errors import ConfigurationError
from disagg.base.request import Role
from disagg.base.transfer_settings import TransferSettings
from disagg.cli.flags import build, flags_of
from disagg.cli.placement_file import choose_placement, choose_transfer, classes_of
from disagg.cli.tenants_file import read_tenants
from disagg.cli.values import Count, Name
from disagg.cli.workload_flags import SloType
from disagg.measure.slo import Slo
from disagg.scheduling.by_objectives import with_roles
from disagg.serve.launch.deployment import Deployment, FrontSettings, HostSettings, RemoteSettings

_COUNT = Count(min=0, max=MAX_INSTANCES)


@click.command()
@click.argument("model", required=False)
@click.option("--prefill", type=_COUNT, metavar="N", help="Prefill instances.  [default: 1, or 0 with --colocated]")
@click.option("--decode", type=_COUNT, metavar="N", help="Decode instances.  [default: 1, or 0 with --colocated]")
@click.option("--colocated", type=_COUNT, metavar="N", help="Instances that do both, the baseline.  [default: 0]")
@click.option(
    "--join", metavar="HOST:PORT", help="Run one instance for a server on another host (its --listen-instances)."
)
@click.option("--role", type=Name([role.value for role in Role]), help="Of the instance that joins.")
@click.option("--placement", type=click.Path(path_type=Path), metavar="FILE", help="Instances from a YAML file.")
@flags_of(ServeSettings, ModelSettings, without={"model"}, environment={"api_key": "DISAGG_API_KEY"})
@click.option(
    "--slo",
    type=SloType(),
    metavar="SLO",
    help="Latency objectives, such as ttft=500ms,tpot=50ms.",
)
@click.option(
    "--tenants",
    "tenants_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keys, weights and bounds of those who share the server, from a YAML file.",
)
@flags_of(
    CacheSettings,
    TransferSettings,
    SchedulerSettings,
    HostSettings,
    RemoteSettings,
    RouterSettings,
    FrontSettings,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line on stdout when ready.")
@click.option(
    "--log-level",
    type=Name(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least important messages to show.",
)
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    as_json: bool,
    log_level: str,
    placement: Path | None,
    slo: Slo | None,
    join: str | None,
    role: str | None,
    **values: Any,
) -> None:
    """Serve MODEL: a Hugging Face folder, a hub id or a GGUF file; without it, SmolLM2-135M-Instruct.

    Starts the instances and an OpenAI-compatible API. Ctrl-C drains and ends all, a second one ends at once.
    """
    tenants = read_tenants(values.pop("tenants_file"))
    counts = {one: values[one.value] for one in Role}
    if (join is None) != (role is None):
        raise ConfigurationError("--join HOST:PORT and --role go together: an instance joins in one role")
    if join is not None and (placement is not None or any(count is not None for count in counts.values())):
        raise ConfigurationError("--join runs one instance, in the role of --role: leave out the numbers of instances")
    remote = build(RemoteSettings, values)
    if join is not None and remote.cluster is not None:
        raise ConfigurationError("--join is for an instance, --cluster for a server: leave one out")
    others_join = remote.listen_instances is not None
    chosen = choose_placement(placement, counts, others_join=others_join)
    scheduler = build(SchedulerSettings, values | {"objectives": (slo or Slo()).objectives()})
    router = build(RouterSettings, values | {"tenants": tenants.settings(), "classes": classes_of(chosen)})
    deployment = Deployment(
        placement=chosen,
        model=build(ModelSettings, values),
        cache=build(CacheSettings, values),
        transfer=choose_transfer(values, chosen),
        scheduler=scheduler,
        router=with_roles(router, scheduler.objectives),
        serve=build(ServeSettings, values | {"tenant_keys": tenants.keys()}),
        host=build(HostSettings, values),
        remote=remote,
        front=build(FrontSettings, values),
    )
    from disagg.cli.serve_output import make_display

    level = "debug" if ctx.find_root().params.get("debug") else log_level
    with make_display(as_json, logging.getLevelNamesMapping()[level.upper()]) as display:
        if join is not None:
            from disagg.serve.launch.join import join as join_server

            join_server(deployment, Role(role), join, display.instance_line)
            return
        from disagg.serve.launch.main import serve as run_server

        run_server(deployment, display)
