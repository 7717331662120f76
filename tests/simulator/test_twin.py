"""A live deployment against its simulation, both in virtual time and with the same costs of steps, pulls and messages.

Router and engine loops are the live ones; what takes time is replaced by what knows the time (``virtual_deployment``).
Then both must take the same decisions at the same moments: the logs of their cores are equal, through deaths, restarts,
cancelled requests and failed pulls.
"""

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from simulated import LinearLatency, cluster_spec, instance, lending, name_blocks, poisson, serve
from virtual_deployment import TOKEN, VirtualDeployment, VirtualLoop

from disagg.base.config import RouterSettings, SchedulingMode
from disagg.base.ids import InstanceId, RequestId
from disagg.base.messages import InstanceLoad
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.costs.links import LinkModel
from disagg.costs.platform import KvWindow
from disagg.measure.arrivals import ArrivalKind, Arrivals
from disagg.measure.open_loop import LengthLimits, OpenLoop
from disagg.measure.timeline import Stage
from disagg.measure.trace import Trace
from disagg.scheduling.dispatch.actions import Deliver, FailReason, SendLend, SendMigrate
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Join, Undrain
from disagg.scheduling.event_log import AnyRecord, InstanceRecord, parse_log, replay
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.router.outputs import MessageDropped, SendOffer, SendPartOffer
from disagg.serve.router import shell as shell_module
from disagg.simulator.cluster import ClusterSpec
from disagg.simulator.event_log import EventLogFolder
from disagg.simulator.faults import Faults, InstanceDeath, TimedCommand
from disagg.simulator.request import FIRST_EPOCH, Outcome, SimulatedRequest

LINK = LinkModel(bytes_per_s=2e8, latency_s=0.0007)
TWO_AND_ONE = cluster_spec(
    instance(Role.PREFILL),
    instance(Role.PREFILL, number=1),
    instance(Role.DECODE, num_blocks=300),
    link=LINK,
    message_s=0.0002,
)


def records(path: Path) -> tuple[AnyRecord, ...]:
    log = parse_log(path.read_bytes().splitlines(keepends=True))
    assert replay(log) is None
    return log.records


def decisions(path: Path) -> list[tuple[float, list[object]]]:
    """What the router decided and when. The simulation reports only those tokens that its decisions hang on."""
    told = []
    for record in records(path):
        outputs = [output for output in record.outputs if not isinstance(output, Deliver | MessageDropped)]
        if outputs:
            told.append((record.now, outputs))
    return told


def run_both(
    spec: ClusterSpec, requests: list[SimulatedRequest], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> VirtualDeployment:
    """Serve the requests live and simulated, and compare every decision; return the live deployment."""
    with EventLogFolder(folder / "simulated") as log:
        serve(spec, requests, log=log)
    live = VirtualDeployment(spec, folder / "live")
    monkeypatch.setattr(shell_module.asyncio, "get_running_loop", lambda: VirtualLoop(live.queue))
    live.run(requests)
    names = {path.name for path in (folder / "simulated").iterdir()}
    assert names == {path.name for path in (folder / "live").iterdir()}
    for name in sorted(names - {"router.jsonl"}):
        assert records(folder / "live" / name) == records(folder / "simulated" / name), name
    assert decisions(folder / "live" / "router.jsonl") == decisions(folder / "simulated" / "router.jsonl")
    return live


def load_of(path: Path) -> InstanceLoad:
    """What an instance has found where, by the log of its core."""
    log = parse_log(path.read_bytes().splitlines(keepends=True))
    assert isinstance(log.header, InstanceHeader)
    core = InstanceCore(log.header)
    for record in log.records:
        assert isinstance(record, InstanceRecord)
        core.handle(record.inputs, record.now)
    return core.load()


def named(requests: list[SimulatedRequest]) -> list[SimulatedRequest]:
    """Give all blocks, of prompts and answers, the names that the live edge and the live engine give them."""
    for request in requests:
        name_blocks(request, [0] * request.prompt_len + [TOKEN] * request.output_len)
    return requests


def check_stages(live: VirtualDeployment, requests: list[SimulatedRequest]) -> None:
    """Both stamped the same times on every request, stage by stage."""
    for request in requests:
        stages = live.streams[request.request_id].timeline.stages()
        heard_later = {Stage.DECODE, Stage.DELIVERY}  # the live router hears of later tokens after a message
        if math.isnan(request.timeline.pull_started_s):  # one instance computed it all, the second token too
            heard_later.add(Stage.FIRST_DECODE)
        for stage, expected_s in request.timeline.stages().items():
            if stage not in heard_later:
                assert stages[stage] == pytest.approx(expected_s, abs=1e-12), (request.request_id, stage)


@pytest.mark.parametrize("mode", SchedulingMode)
@pytest.mark.parametrize("num_blocks", [512, 40])
def test_a_colocated_instance(
    mode: SchedulingMode, num_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cluster_spec(
        instance(
            Role.COLOCATED,
            num_blocks=num_blocks,
            scheduling=mode,
            objectives=Objectives(ttft_s=0.5, tpot_s=0.004),
            latency=LinearLatency(),
        )
    )
    requests = named(poisson(rate=40, count=60, seed=4))
    live = run_both(spec, requests, tmp_path, monkeypatch)
    check_stages(live, requests)
    for request in requests:
        times = live.token_times[request.request_id]
        assert len(times) == request.output_len
        assert (times[0], times[-1]) == (request.timeline.first_token_s, request.timeline.last_token_s)


@pytest.mark.parametrize("mode", SchedulingMode)
@pytest.mark.parametrize("num_blocks", [2000, 120])
def test_layers_with_a_window(
    mode: SchedulingMode, num_blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are given back behind it while answers are written, also where sequences have to make room."""
    kv_window = KvWindow(tokens=40, bytes_per_token=600, num_each=3)
    one = instance(Role.COLOCATED, num_blocks=num_blocks, scheduling=mode, latency=LinearLatency())
    requests = named(poisson(rate=40, count=60, seed=4, prompt=(16, 60), output=(60, 300)))
    live = run_both(cluster_spec(replace(one, kv_window=kv_window)), requests, tmp_path, monkeypatch)
    check_stages(live, requests)
    assert {len(live.token_times[request.request_id]) - request.output_len for request in requests} == {0}
    (name,) = [path for path in (tmp_path / "live").iterdir() if path.name != "router.jsonl"]
    assert bool(load_of(name).num_preemptions_total) == (num_blocks == 120)


@pytest.mark.parametrize("seed", range(3))
def test_two_prefill_instances_into_one_decode_instance(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = named(poisson(rate=60, count=80, seed=seed))
    live = run_both(TWO_AND_ONE, requests, tmp_path, monkeypatch)
    check_stages(live, requests)
    assert {len(live.token_times[request.request_id]) - request.output_len for request in requests} == {0}


@pytest.mark.parametrize(
    ("kv_window", "decode_size"),
    [(None, 16), (KvWindow(tokens=100, bytes_per_token=600), 16), (None, 32), (None, 8)],
    ids=["full", "sliding", "larger", "smaller"],
)
def test_long_prompts_are_read_while_they_are_computed(
    kv_window: KvWindow | None, decode_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through deaths of both sides and clients that leave, with more blocks wanted than there are."""
    *prefill, decode = (replace(one, kv_window=kv_window) for one in TWO_AND_ONE.instances)
    sized = replace(decode, block_size=decode_size, num_blocks=decode.num_blocks * 16 // decode_size)
    instances = (*prefill, sized)
    requests = poisson(rate=25, count=60, seed=6, prompt=(300, 2000), output=(1, 40))
    for request in requests[::6]:
        request.cancel_s = request.arrival_s + 0.03
    faults = Faults(
        deaths=(
            InstanceDeath(0.61, InstanceId("prefill-1"), start_s=0.2),
            InstanceDeath(1.02, InstanceId("decode-0"), start_s=0.1),
        )
    )
    run_both(replace(TWO_AND_ONE, instances=instances, faults=faults), requests, tmp_path, monkeypatch)
    told = [output for _, outputs in decisions(tmp_path / "live" / "router.jsonl") for output in outputs]
    assert len({output.request_id for output in told if isinstance(output, SendPartOffer)}) > 20


@pytest.mark.parametrize("seed", range(3))
def test_cores_are_lent(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three instances of one host, which die and come back; one has two cores."""
    first, *others = TWO_AND_ONE.instances
    faults = Faults(
        deaths=(
            InstanceDeath(0.51, InstanceId("prefill-1"), start_s=0.2),
            InstanceDeath(0.93, InstanceId("decode-0"), start_s=0.1),
        )
    )
    spec = lending(replace(TWO_AND_ONE, instances=(replace(first, num_threads=2), *others), faults=faults), wider=0.6)
    requests = named(poisson(rate=60, count=80, seed=seed, prompt=(16, 900)))
    run_both(spec, requests, tmp_path, monkeypatch)
    assert {request.outcome for request in requests} == {Outcome.FINISHED}
    assert load_of(tmp_path / "live" / "prefill-0.jsonl").borrowed_core_seconds_total > 0


@pytest.mark.parametrize("mode", [SchedulingMode.CHUNKED, SchedulingMode.SLACK])
def test_paths_by_prediction(mode: SchedulingMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"tells_costs": True, "scheduling": mode, "objectives": Objectives(ttft_s=0.02, tpot_s=0.004)}
    spec = cluster_spec(
        instance(Role.PREFILL, **told),
        instance(Role.DECODE, num_blocks=300, **told),
        link=LINK,
        router=RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, strict_roles=False),
    )
    requests = poisson(rate=250, count=150, seed=2, prompt=(16, 400))
    live = run_both(spec, requests, tmp_path, monkeypatch)
    check_stages(live, requests)
    ended = [request.path_ended for request in requests if request.path_ended is not None]
    assert len(ended) == len(requests)
    assert {one.follows_roles for one in ended} == {True, False}


@pytest.mark.parametrize("seed", range(3))
def test_deaths_restarts_cancelled_requests_and_failed_pulls(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = named(poisson(rate=60, count=120, seed=seed))
    for request in requests[::7]:
        request.cancel_s = request.arrival_s + 0.02 * (1 + seed)
    faults = Faults(
        deaths=(
            InstanceDeath(0.51, InstanceId("prefill-1"), start_s=0.2),
            InstanceDeath(0.93, InstanceId("decode-0"), start_s=0.1),
            InstanceDeath(1.4, InstanceId("prefill-1"), start_s=0.1),
        ),
        failing_pulls=frozenset(request.request_id for request in requests[::5]),
    )
    run_both(replace(TWO_AND_ONE, faults=faults), requests, tmp_path, monkeypatch)
    outcomes = {request.outcome for request in requests}
    assert outcomes <= {Outcome.FINISHED, Outcome.FAILED, Outcome.CANCELLED}
    for request in requests:
        if request.outcome is Outcome.FINISHED:
            assert request.num_output_tokens == request.output_len
        elif request.outcome is Outcome.FAILED:
            assert request.fail_reason is FailReason.INSTANCE_LOST
            assert request.detail.count(" died ") == 2
    assert any(request.epoch > FIRST_EPOCH and request.outcome is Outcome.FINISHED for request in requests)
    assert {path.name for path in (tmp_path / "live").iterdir()} >= {"prefill-1.2.jsonl", "decode-0.1.jsonl"}


@pytest.mark.parametrize("seed", range(3))
def test_drains_joins_flips_and_a_removal_among_deaths(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p0, p1, d0, d1 = (InstanceId(name) for name in ("prefill-0", "prefill-1", "decode-0", "decode-1"))
    faults = Faults(
        deaths=(InstanceDeath(0.93, d1, start_s=0.1),),
        commands=(
            TimedCommand(0.2, Join(instance=d1, role=Role.DECODE), start_s=0.1),
            TimedCommand(0.5, Drain(instance=d0)),
            TimedCommand(0.8, Undrain(instance=d0)),
            TimedCommand(1.1, ChangeRole(instance=p1, role=Role.DECODE)),
            TimedCommand(1.2, Drain(instance=p0)),  # nobody else prefills: it is refused
            TimedCommand(1.4, ChangeRole(instance=d0, role=Role.PREFILL)),
            TimedCommand(1.6, Drain(instance=p1, leave=True)),
        ),
    )
    spec = replace(TWO_AND_ONE, spares=(instance(Role.DECODE, number=1, num_blocks=300),), faults=faults)
    requests = named(poisson(rate=60, count=120, seed=seed))
    run_both(spec, requests, tmp_path, monkeypatch)
    assert {request.outcome for request in requests} == {Outcome.FINISHED}
    assert [request.num_output_tokens for request in requests] == [request.output_len for request in requests]
    told = [output for _, outputs in decisions(tmp_path / "live" / "router.jsonl") for output in outputs]
    assert {output.instance for output in told if isinstance(output, SendMigrate)} == {d0, p1}


@pytest.mark.parametrize(("append_turns", "seed", "num_blocks"), [(False, 0, 80), (True, 0, 150)])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=lambda sizes: f"{sizes[0]}-to-{sizes[1]}")
def test_a_decode_instance_lends_its_conversations_and_goes_on_with_them(
    sizes: tuple[int, int],
    append_turns: bool,
    seed: int,
    num_blocks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four conversations of growing prompts on one pair of small pools, with host memory behind that which decodes.

    Their blocks may be of unequal size: names, of blocks of 16 tokens, are found on both all the same.
    """
    theirs, ours = sizes
    tiers = {"max_host_blocks": 960 // ours, "host_memory": LinkModel(bytes_per_s=1e9, latency_s=1e-5)}
    spec = cluster_spec(
        instance(Role.PREFILL, num_blocks=1280 // theirs, block_size=theirs),
        instance(Role.DECODE, num_blocks=num_blocks * 16 // ours, block_size=ours, **tiers),
        link=LINK,
        message_s=0.0002,
        router=RouterSettings(max_queued_requests=10**6, request_timeout_s=1e6, append_turns=append_turns),
    )
    rng = random.Random(seed)
    requests = poisson(rate=25, count=32, seed=seed, prompt=(16, 60), output=(1, 160))
    turns: Counter[int] = Counter()
    for request in requests:
        story = rng.randrange(4)
        request.prompt_len += min(120 * turns[story], 840)
        turns[story] += 1
        tokens = [0] * request.prompt_len + [TOKEN] * request.output_len
        name_blocks(request, tokens, bytes([story]))
    live = run_both(spec, requests, tmp_path, monkeypatch)
    told = [output for _, outputs in decisions(tmp_path / "live" / "router.jsonl") for output in outputs]
    lent = {output.request_id for output in told if isinstance(output, SendLend)}
    assert lent & {output.request_id for output in told if isinstance(output, SendOffer)}
    if theirs == ours and not append_turns:
        assert any(one.prompt_len % 16 == 0 for one in requests if one.request_id in lent), "held to its end"
    assert {request.outcome for request in requests} == {Outcome.FINISHED}
    assert {request.epoch for request in requests} == {FIRST_EPOCH}, "nobody was computed twice"
    assert {len(live.token_times[request.request_id]) - request.output_len for request in requests} == {0}


def test_one_that_reads_ahead_is_given_the_same_sequence_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefill instance dies meanwhile: the end of one attempt and the beginning of the next come in one turn."""
    faults = Faults(deaths=(InstanceDeath(0.36, InstanceId("prefill-0"), start_s=0.1),))
    spec = cluster_spec(
        instance(Role.PREFILL), instance(Role.DECODE, num_blocks=300), link=LINK, message_s=0.0002, faults=faults
    )
    requests = poisson(rate=60, count=40, seed=6, prompt=(600, 1500), output=(20, 60))
    live = run_both(spec, requests, tmp_path, monkeypatch)
    assert any(request.epoch > FIRST_EPOCH for request in requests)
    assert {len(live.token_times[request.request_id]) - request.output_len for request in requests} == {0}


@pytest.mark.parametrize(("seed", "disk_bytes_per_s"), [(0, 2e8), (1, 2e6)])
def test_simulated_hits_are_the_live_ones_in_pool_and_tiers(
    seed: int, disk_bytes_per_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten conversations of growing prompts, with room for three in the pool and for fewer in host memory."""
    tiers = {
        "num_blocks": 80,
        "max_host_blocks": 60,
        "host_memory": LinkModel(bytes_per_s=1e9, latency_s=1e-5),
        "max_disk_blocks": 4000,
        "disk": LinkModel(bytes_per_s=disk_bytes_per_s, latency_s=1e-4),
    }
    spec = cluster_spec(
        instance(Role.COLOCATED, **tiers), instance(Role.COLOCATED, number=1, **tiers), link=LINK, message_s=0.0002
    )
    rng = random.Random(seed)
    requests = poisson(rate=25, count=80, seed=seed, prompt=(16, 60), output=(1, 60))
    turns: Counter[int] = Counter()
    for request in requests:
        story = rng.randrange(10)
        request.prompt_len += 24 * turns[story]
        turns[story] += 1
        tokens = [0] * request.prompt_len + [TOKEN] * request.output_len
        name_blocks(request, tokens, bytes([story]))
    live = run_both(spec, requests, tmp_path, monkeypatch)
    check_stages(live, requests)
    assert min(hits_of_both(tmp_path, spec)) > 0


def test_simulated_hits_on_a_trace_are_the_live_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_data: Path
) -> None:
    """Mooncake's synthetic trace with a thirty-second of its tokens, and less memory than they fill."""
    tiers = {
        "num_blocks": 250,
        "max_host_blocks": 700,
        "host_memory": LinkModel(bytes_per_s=1e9, latency_s=1e-5),
        "max_disk_blocks": 20_000,
        "disk": LinkModel(bytes_per_s=1e8, latency_s=1e-4),
    }
    spec = cluster_spec(
        *(instance(role, number, **tiers) for role in (Role.PREFILL, Role.DECODE) for number in range(2)),
        link=LINK,
        message_s=0.0002,
    )
    trace = Trace(reference_data / "traces" / "mooncake_synthetic.jsonl.gz", 140)
    workload = OpenLoop(trace, Arrivals(ArrivalKind.REPLAY, 12.0, batch_s=3.0), LengthLimits(max_total_len=64_000))
    requests = []
    for number, row in enumerate(workload.draw(0)):
        prompt_len, output_len = -(-row.prompt_len // 32), -(-row.output_len // 32)
        request = SimulatedRequest(RequestId(f"r{number}"), row.arrival_s, prompt_len, output_len)
        tokens = [name for name in row.prefix.ids for _ in range(row.prefix.block_tokens // 32)]
        num_named = min(len(tokens), prompt_len) // 16 * 16  # the live client's prompt is of zeros beyond its names
        rest = [0] * (prompt_len - num_named) + [TOKEN] * output_len
        name_blocks(request, tokens[:num_named] + rest)
        requests.append(request)
    run_both(spec, requests, tmp_path, monkeypatch)
    assert min(hits_of_both(tmp_path, spec)) > 0


def hits_of_both(folder: Path, spec: ClusterSpec) -> tuple[int, ...]:
    """Return the tokens found in pools, in host memory and on disk, which are those of the simulation."""
    hits = []
    for one in spec.instances:
        load, simulated = (load_of(folder / side / f"{one.name}.jsonl") for side in ("live", "simulated"))
        assert load == simulated
        hits.append((load.num_prefix_hits_total, load.num_prefix_from_host_total, load.num_prefix_loaded_total))
    return tuple(map(sum, zip(*hits, strict=True)))
