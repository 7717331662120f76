"""``disagg profile``: measure what steps, pulls and messages take on this machine, for ``disagg simulate``."""

import os
import random
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from disagg.base.config import CacheSettings, Device, InstanceGroup, ModelSettings, Placement, SchedulerSettings
from disagg.base.request import Role
from disagg.cli.flags import build, flag_name, flags_of
from disagg.cli.host_costs import HostMeasurement, measure_host_costs
from disagg.cli.profile_report import print_summary, summarise
from disagg.cli.served_streams import StreamLimits
from disagg.cli.values import Number, OutputPath
from disagg.measure.machine import this_machine
from disagg.serve.launch.deployment import Deployment, HostSettings, plan_instances
from disagg.simulator.contention import Activity
from disagg.simulator.links import fit_link
from disagg.simulator.measured_steps import StepSample
from disagg.simulator.memory import MemorySample
from disagg.simulator.profile import ParallelSamples, Profile, save_profile

if TYPE_CHECKING:
    from disagg.engine.profiling.campaign import Campaign, Measurement, OnProgress
    from disagg.engine.profiling.script import MeasuredStep

_PAIR: Final = Placement(groups=(InstanceGroup(role=Role.PREFILL, count=1), InstanceGroup(role=Role.DECODE, count=1)))
_QUICK_ALONE_S: Final = 9.0
_QUICK_BESIDE_S: Final = 3.0
_HOST: Final = (24, 3)
_QUICK_HOST: Final = (12, 1)
"""Requests that have a server for themselves, and rounds of streams."""
_MOST_LOST: Final = 0.05
"""Part of the time that the core may belong to others before a profile is called into question."""
_SERVER_SETTINGS: Final = (ModelSettings, CacheSettings, SchedulerSettings, HostSettings)


@click.command()
@click.argument("model", required=False)
@click.option(
    "-o",
    "--output",
    type=OutputPath("the profile"),
    required=True,
    metavar="FILE.json",
    help="Where the profile goes.",
)
@click.option("--quick", is_flag=True, help="Fewer steps, each measured less often: a look, in about a minute.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Of the steps and their order.")
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="Of sampling: above 0, each token costs two more passes over the vocabulary.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@flags_of(ModelSettings, without={"model"})
@flags_of(CacheSettings, SchedulerSettings)
@flags_of(HostSettings, without={"event_log"})
def profile(model: str | None, output: Path, as_json: bool, **values: Any) -> None:
    """Measure how long MODEL takes on this machine, for disagg simulate --latency FILE.json.

    Times the steps of a live instance on the cores that disagg serve would give it, alone and while a second instance
    computes on its own cores; the hand-over of KV blocks; and what HTTP and messages add. Takes 3 to 4 minutes.
    """
    deployment = Deployment(
        placement=_PAIR,
        model=build(ModelSettings, values | {"model": model}),
        cache=build(CacheSettings, values),
        scheduler=build(SchedulerSettings, values),
        host=build(HostSettings, values | {"event_log": None}),
    )
    with _shown_progress() as on_progress:
        from disagg.engine.profiling.campaign import measure

        campaign = plan_campaign(deployment, values["seed"], values["quick"], values["temperature"])
        measured = measure(campaign, on_progress)
        on_progress("server", 0.0)
        host = measure_host_costs(
            model,
            serve_arguments(values),
            *(_QUICK_HOST if values["quick"] else _HOST),
            StreamLimits(
                max_total_len=measured.facts.max_model_len,
                max_batch_tokens=deployment.scheduler.max_batch_tokens,
                max_batch_size=deployment.scheduler.max_batch_size,
                vocab_size=measured.facts.vocab_size,
            ),
        )
        on_progress("server", 1.0)
    measured_profile = to_profile(campaign, measured, host, model_name(model))
    save_profile(measured_profile, output)
    if deployment.host.device is Device.CPU:
        warn_if_busy(measured.alone)
    print_summary(summarise(measured_profile, output), as_json)


def plan_campaign(deployment: Deployment, seed: int, quick: bool, temperature: float) -> "Campaign":
    """Return what to measure: an instance as ``disagg serve`` would start it, beside another if there is a core."""
    from disagg.engine.profiling.campaign import Campaign

    instance, neighbour = plan_instances(
        deployment, control_endpoint="", available_cores=sorted(os.sched_getaffinity(0)), parent_pid=0
    )
    durations = {"alone_s": _QUICK_ALONE_S, "beside_s": _QUICK_BESIDE_S} if quick else {}
    return Campaign(
        instance=instance,
        neighbour=None if set(instance.cpus) & set(neighbour.cpus) else neighbour,
        seed=seed,
        quick=quick,
        temperature=temperature,
        **durations,
    )


def to_profile(campaign: "Campaign", measured: "Measurement", host: HostMeasurement, name: str) -> Profile:
    """Return the profile that a campaign's measurements make."""
    facts, settings, machine = measured.facts, campaign.instance, this_machine()
    samples = [_sample(step, None) for step in measured.alone]
    memory: list[MemorySample] = []
    for activity, parts in measured.beside.items():
        for part in parts:
            read = [MemorySample(alone=one.alone, together=one.together) for one in part.memory]
            together = statistics.harmonic_mean([one.together for one in read]) if read else None
            samples += [_sample(step, Activity(activity), together) for step in part.steps]
            memory += read
    # What is held out is chosen by position: in random order, no kind of step is left out of either part.
    random.Random(campaign.seed).shuffle(samples)
    kv_bytes_per_token = facts.kv_bytes // (facts.num_blocks * facts.block_size)
    block_bytes = kv_bytes_per_token * facts.block_size
    link = fit_link([(-(-pull.num_tokens // facts.block_size) * block_bytes, pull.time_s) for pull in host.pulls])
    return Profile(
        model=name,
        device=machine.processor if facts.device == "cpu" else facts.device,
        dtype=settings.model.dtype.value,
        num_threads=settings.num_threads,
        kv_bytes_per_token=kv_bytes_per_token,
        steps=(ParallelSamples(tensor_parallel=1, samples=tuple(samples)),),
        link_bytes_per_s=link.bytes_per_s,
        link_latency_s=link.latency_s,
        accept_s=host.lone.accept_s,
        message_s=host.lone.message_s,
        deliver_s=host.lone.deliver_s,
        temperature=campaign.temperature,
        num_cores=machine.num_cores,
        served=host.served,
        served_requests=host.requests,
        memory=tuple(memory),
    )


def serve_arguments(values: dict[str, Any]) -> Sequence[str]:
    """Return the flags of ``disagg serve`` that say what the flags of this command say."""
    arguments = []
    for name in (name for kind in _SERVER_SETTINGS for name in kind.__struct_fields__):
        value = values.get(name)
        if isinstance(value, bool):
            arguments.append(flag_name(name) if value else flag_name(name).replace("--", "--no-", 1))
        elif value is not None and value != ():
            arguments += [flag_name(name), ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return arguments


def model_name(model: str | None) -> str:
    """Return what the model is called."""
    from disagg.models.locate import locate_model

    return locate_model(model).name


def warn_if_busy(steps: "Sequence[MeasuredStep]") -> None:
    """Say on stderr when other processes took much of the measured instance's core."""
    lost = 1 - statistics.median(step.on_core for step in steps)
    if lost > _MOST_LOST:
        click.echo(
            f"warning: the instance's core was taken from it for {lost:.0%} of the time; measure on an idle machine",
            err=True,
        )


def _sample(step: "MeasuredStep", neighbour: Activity | None, memory_bytes_per_s: float | None = None) -> StepSample:
    return StepSample(
        chunks=step.chunks, time_s=step.time_s, neighbour=neighbour, memory_bytes_per_s=memory_bytes_per_s
    )


@contextmanager
def _shown_progress() -> "Iterator[OnProgress]":
    """Show on stderr what is being measured, one bar for each part."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    with Progress(console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, fraction: float) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=fraction)

        yield show
