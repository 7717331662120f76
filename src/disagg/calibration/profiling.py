"""From a deployment to the profile of its model on this machine: what is measured, and what comes of it."""

import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from disagg.base.config import Device
from disagg.calibration.host_costs import HostMeasurement, HostNumbers, host_costs, measure_host_costs
from disagg.calibration.served_streams import StreamLimits
from disagg.calibration.steps.campaign import Campaign, Measurement, OnProgress, measure
from disagg.calibration.steps.script import MeasuredStep
from disagg.costs.contention import Activity
from disagg.costs.links import fit_link, fit_offers
from disagg.costs.measured_steps import StepSample
from disagg.costs.memory import MemorySample
from disagg.costs.profile import ParallelSamples, Profile
from disagg.measure.machine import this_machine
from disagg.models.locate import locate_model
from disagg.serve.launch.deployment import Deployment, plan_instances, usable_cores

_QUICK_ALONE_S: Final = 9.0
_QUICK_BESIDE_S: Final = 3.0
_HOST: Final = HostNumbers(requests=24, rounds=3, hand_overs=8, hand_over_lengths=(64, 512, 1024, 2048, 4096))
_QUICK_HOST: Final = HostNumbers(requests=12, rounds=1, hand_overs=5, hand_over_lengths=(64, 512, 1024, 2048))
_MOST_LOST: Final = 0.05
"""Part of the time that the core may belong to others before a profile is called into question."""


@dataclass(frozen=True)
class MadeProfile:
    """A profile, and what speaks against it; empty on a calm machine."""

    profile: Profile
    warnings: tuple[str, ...]


def make_profile(
    deployment: Deployment,
    serve_arguments: Sequence[str],
    on_progress: OnProgress,
    *,
    threads: Sequence[int] = (),
    seed: int = 0,
    quick: bool = False,
    temperature: float = 0.0,
) -> MadeProfile:
    """Measure steps of instances of each number of ``threads``, then a whole server of the fewest; takes minutes.

    ``deployment`` is a pair; ``serve_arguments`` are the flags of ``disagg serve`` that say the same, but for model and
    threads. No ``threads`` are those that a placement on these cores may have: one, half of them, all. Raises
    ConfigurationError when the model or a setting cannot be used, UnavailableError when no server starts.
    """
    campaigns = [plan_campaign(one, seed, quick, temperature) for one in deployments_of(deployment, threads)]
    results = [
        measure(campaign, _named(on_progress, campaign, is_one_of_many=len(campaigns) > 1)) for campaign in campaigns
    ]
    on_progress("server", 0.0)
    measured = results[0]
    if threads or len(campaigns) > 1:
        serve_arguments = [*serve_arguments, "--threads", str(campaigns[0].instance.num_threads)]
    host = measure_host_costs(
        deployment.model.model,
        serve_arguments,
        _QUICK_HOST if quick else _HOST,
        StreamLimits(
            max_total_len=measured.facts.max_model_len,
            max_batch_tokens=deployment.scheduler.max_batch_tokens,
            max_batch_size=deployment.scheduler.max_batch_size,
            vocab_size=measured.facts.vocab_size,
        ),
    )
    on_progress("server", 1.0)
    profile = to_profile(list(zip(campaigns, results, strict=True)), host, locate_model(deployment.model.model).name)
    is_on_cores = deployment.host.device is Device.CPU
    return MadeProfile(profile, busy_warnings([one.alone for one in results]) if is_on_cores else ())


def deployments_of(deployment: Deployment, threads: Sequence[int]) -> list[Deployment]:
    """Return the pair at each number of threads, the fewest first; on a device, as it is."""
    host = deployment.host
    if host.device is not Device.CPU:
        return [deployment]
    num_cores = len(usable_cores(host.cpus, sorted(os.sched_getaffinity(0))))
    wanted = sorted({*threads} or {1, max(1, num_cores // 2), num_cores})
    return [
        msgspec.structs.replace(deployment, host=msgspec.structs.replace(host, threads=number)) for number in wanted
    ]


def _named(on_progress: OnProgress, campaign: Campaign, *, is_one_of_many: bool) -> OnProgress:
    """Return what tells of a campaign by its threads, where there are others."""
    if not is_one_of_many:
        return on_progress
    return lambda what, part: on_progress(f"{what}, {campaign.instance.num_threads} thread(s)", part)


def plan_campaign(deployment: Deployment, seed: int, quick: bool, temperature: float) -> Campaign:
    """Return what to measure: an instance as ``disagg serve`` would start it, beside another if there is a core."""
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


def to_profile(campaigns: Sequence[tuple[Campaign, Measurement]], host: HostMeasurement, name: str) -> Profile:
    """Return the profile that the measurements of campaigns make, one for each number of threads."""
    campaign, measured = campaigns[0]
    facts, machine = measured.facts, this_machine()
    kv_bytes_per_token = facts.kv_bytes // facts.pool_tokens
    block_bytes = kv_bytes_per_token * facts.block_size
    sizes = [-(-one.num_tokens // facts.block_size) * block_bytes for one in host.hand_overs]
    link = fit_link([(size, one.bytes_s.p50) for size, one in zip(sizes, host.hand_overs, strict=True)])
    offers = fit_offers([(size, one.control_s.p50) for size, one in zip(sizes, host.hand_overs, strict=True)])
    lone = host_costs(host.lone, offers.message_s)
    return Profile(
        model=name,
        device=machine.processor if facts.device == "cpu" else facts.device,
        dtype=campaign.instance.model.dtype.value,
        kv_bytes_per_token=kv_bytes_per_token,
        steps=tuple(_parallel_samples(*one) for one in campaigns),
        link_bytes_per_s=link.bytes_per_s,
        link_latency_s=link.latency_s,
        digest_bytes_per_s=offers.digest_bytes_per_s,
        accept_s=lone.accept_s,
        message_s=lone.message_s,
        deliver_s=lone.deliver_s,
        temperature=campaign.temperature,
        num_cores=machine.num_cores,
        served=host.served,
        served_requests=host.requests,
    )


def _parallel_samples(campaign: Campaign, measured: Measurement) -> ParallelSamples:
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
    settings = campaign.instance
    return ParallelSamples(
        tensor_parallel=1,
        num_threads=settings.num_threads if settings.device is Device.CPU else None,
        samples=tuple(samples),
        memory=tuple(memory),
    )


def busy_warnings(campaigns: Sequence[Sequence[MeasuredStep]]) -> tuple[str, ...]:
    """Return a sentence when other processes took much of a measured instance's core, else nothing."""
    lost = max(1 - statistics.median(step.on_core for step in steps) for steps in campaigns)
    if lost <= _MOST_LOST:
        return ()
    return (f"the instance's core was taken from it for {lost:.0%} of the time; measure on an idle machine",)


def _sample(step: MeasuredStep, neighbour: Activity | None, memory_bytes_per_s: float | None = None) -> StepSample:
    return StepSample(
        chunks=step.chunks, time_s=step.time_s, neighbour=neighbour, memory_bytes_per_s=memory_bytes_per_s
    )
