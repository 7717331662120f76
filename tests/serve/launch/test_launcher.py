"""Launcher and live router over real processes and sockets; only the model is missing."""

import asyncio
import os
import resource
import signal
from collections.abc import AsyncIterator

import psutil
import pytest
import pytest_asyncio
from fake_instance import Behaviour, expected_tokens
from fakes import DEADLINE_S, FAKE_ENGINE, PAIR, Memory, make_deployment, wait_until
from reading import outputs

from disagg.base.config import InstanceGroup, Placement
from disagg.base.errors import ConfigurationError, InstanceLostError, UnavailableError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import SamplingParams
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.restart import RestartPolicy, RestartSettings
from disagg.serve.launch.deployment import plan_instances
from disagg.serve.launch.launcher import Launcher
from disagg.serve.launch.listening import private_endpoint
from disagg.serve.launch.operator import LocalOperator
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.doorkeeper import SharedKey
from disagg.serve.router.live import LiveRouter

KEY = "known to the router and its instances"
P0, D0 = InstanceId("prefill-0"), InstanceId("decode-0")


class Cluster:
    """A router with instances that are processes."""

    def __init__(self, endpoint: str, placement: Placement, command: tuple[str, ...], **router: float) -> None:
        deployment = make_deployment(placement, **router)
        self.memory = Memory()
        self.router = LiveRouter(
            deployment.roles(),
            deployment.router,
            ZmqControlSocket(endpoint, SharedKey(KEY)),
            restarts=RestartSettings(max_quick_deaths=3, first_delay_s=0.01),
        )
        settings = plan_instances(
            deployment,
            control_endpoint=endpoint,
            available_cores=os.sched_getaffinity(0),
            parent_pid=os.getpid(),
            control_key=KEY,
        )
        self.launcher = Launcher(
            settings,
            self.router,
            self.memory,
            command=command,
        )
        self.operator = LocalOperator(deployment, settings, self.router, self.launcher)
        self.router.start(self.launcher)
        self.launcher.start()
        self._num_requests = 0

    async def ready(self) -> "Cluster":
        async with asyncio.timeout(DEADLINE_S):
            await self.launcher.wait_ready()
        return self

    def request(self, first: int = 1, max_tokens: int = 5) -> GenerationRequest:
        self._num_requests += 1
        return GenerationRequest(
            request_id=RequestId(f"r{self._num_requests}"),
            epoch=Epoch(0),
            prompt_token_ids=(first, 2, 3),
            sampling=SamplingParams(max_tokens=max_tokens, seed=7),
        )

    async def answer(self, request: GenerationRequest) -> list[int]:
        async with asyncio.timeout(DEADLINE_S):
            return [token async for output in outputs(self.router.submit(request)) for token in output.token_ids]

    def states(self) -> dict[InstanceId, InstanceState]:
        return {status.instance: status.state for status in self.router.instances()}

    def num_held(self) -> int:
        return sum(status.load.num_running + status.load.num_leases for status in self.router.instances())

    async def close(self) -> None:
        self.router.stop_instances()
        async with asyncio.timeout(DEADLINE_S):
            await self.launcher.stop()
        self.router.close()


@pytest_asyncio.fixture
async def make_cluster() -> AsyncIterator:
    clusters = []
    of_other_tests = psutil.Process().children(recursive=True)  # multiprocessing's tracker lives as long as we do
    with private_endpoint() as endpoint:

        def make(*options: str, placement: Placement = PAIR, command=FAKE_ENGINE, **router: float) -> Cluster:
            clusters.append(Cluster(endpoint, placement, (*command, *options), **router))
            return clusters[-1]

        yield make
        for cluster in clusters:
            await cluster.close()
    left = [child for child in psutil.Process().children(recursive=True) if child not in of_other_tests]
    assert left == [], "no process is left"


async def test_requests_are_answered_over_two_processes(make_cluster):
    cluster = await make_cluster().ready()
    requests = [cluster.request(first=number, max_tokens=1 + number % 7) for number in range(40)]
    answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
    assert answers == [expected_tokens(request) for request in requests]
    await wait_until(lambda: cluster.num_held() == 0)
    assert {instance for instance, _, _ in cluster.memory.loading} == {P0, D0}


async def test_any_placement_gives_the_same_answers(make_cluster):
    groups = tuple(InstanceGroup(role=role, count=2) for role in Role)
    cluster = await make_cluster(placement=Placement(groups=groups)).ready()
    requests = [cluster.request(first=number) for number in range(40)]
    answers = await asyncio.gather(*(cluster.answer(request) for request in requests))
    assert answers == [expected_tokens(request) for request in requests]


@pytest.mark.parametrize(
    "state",
    [
        Behaviour.STUCK_IN_PREFILL,
        Behaviour.STUCK_BEFORE_OFFER,
        Behaviour.STUCK_IN_PULL,
        Behaviour.STUCK_IN_DECODE,
    ],
)
async def test_an_abort_frees_everything_in_every_state(make_cluster, state):
    cluster = await make_cluster().ready()
    request = cluster.request(first=state)
    cluster.router.submit(request)
    holder = P0 if state in (Behaviour.STUCK_IN_PREFILL, Behaviour.STUCK_BEFORE_OFFER) else D0
    await wait_until(lambda: {s.instance: s.load.num_running for s in cluster.router.instances()}[holder] == 1)
    cluster.router.abort(request.request_id)
    await wait_until(lambda: cluster.num_held() == 0)


@pytest.mark.parametrize(
    ("victim", "state"),
    [
        (P0, Behaviour.STUCK_IN_PREFILL),
        (P0, Behaviour.STUCK_BEFORE_OFFER),
        (D0, Behaviour.STUCK_IN_PULL),
        (D0, Behaviour.STUCK_IN_DECODE),
    ],
)
async def test_a_killed_instance_is_named_and_restarted_and_its_requests_go_on(make_cluster, victim, state):
    cluster = await make_cluster().ready()
    stuck = cluster.request(state)
    answer = asyncio.create_task(cluster.answer(stuck))
    await wait_until(lambda: {s.instance: s.load.num_running for s in cluster.router.instances()}[victim] == 1)
    os.kill(cluster.launcher.pids[victim], signal.SIGKILL)
    assert await answer == expected_tokens(stuck)
    after = cluster.request()
    assert await cluster.answer(after) == expected_tokens(after)  # it waits for the restarted instance
    ((instance, how, restart_in_s),) = cluster.memory.lost
    assert (instance, restart_in_s) == (victim, 0.0)
    assert how.startswith("killed by SIGKILL (by hand, or because memory ran out)")


async def test_an_instance_that_dies_by_itself_says_its_last_words(make_cluster):
    cluster = await make_cluster(max_instance_losses=1).ready()
    with pytest.raises(InstanceLostError, match=r"SIGKILL.*about to die"):
        await cluster.answer(cluster.request(Behaviour.DIE_IN_PREFILL))
    assert (P0, "about to die") in cluster.memory.lines


async def test_what_kills_every_instance_is_stopped_after_two_with_its_story(make_cluster):
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=3),))
    cluster = await make_cluster(placement=placement).ready()
    with pytest.raises(InstanceLostError, match=r"colocated-0 died .*about to die.*colocated-1 died .*about to die"):
        await cluster.answer(cluster.request(Behaviour.DIE_IN_PREFILL))
    assert cluster.router.instances()[2].state is InstanceState.READY


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [(Behaviour.FALL_SILENT, "no sign of life"), (Behaviour.TALK_NONSENSE, "3 malformed messages")],
)
async def test_a_faulty_instance_is_ended_and_restarted(make_cluster, behaviour, words):
    cluster = await make_cluster(instance_timeout_s=2.0, max_instance_losses=1).ready()
    with pytest.raises(InstanceLostError, match=words):
        await cluster.answer(cluster.request(behaviour))
    after = cluster.request()
    assert await cluster.answer(after) == expected_tokens(after)
    ((instance, how, _),) = cluster.memory.lost
    assert instance == P0
    assert words in how


async def test_an_instance_that_dies_too_often_is_given_up_and_the_others_go_on(make_cluster):
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=2),))
    cluster = await make_cluster(placement=placement, max_instance_losses=1).ready()
    for _ in range(3):
        await wait_until(lambda: cluster.router.instances()[0].state is InstanceState.READY)
        with pytest.raises(InstanceLostError):
            await cluster.answer(cluster.request(Behaviour.DIE_IN_PREFILL))
    await wait_until(lambda: len(cluster.memory.lost) == 3)
    assert [delay for _, _, delay in cluster.memory.lost] == [0.0, 0.01, None]
    after = cluster.request()
    assert await cluster.answer(after) == expected_tokens(after)
    assert not cluster.launcher.failed.done()


async def test_the_launcher_fails_when_nothing_can_be_served_any_more(make_cluster):
    cluster = await make_cluster(max_instance_losses=1).ready()
    for _ in range(3):
        with pytest.raises(InstanceLostError):
            await cluster.answer(cluster.request(Behaviour.DIE_IN_PREFILL))
    error = await asyncio.wait_for(cluster.launcher.failed, DEADLINE_S)
    assert isinstance(error, UnavailableError)
    assert "prefill-0 died too often" in str(error)
    with pytest.raises(UnavailableError):
        cluster.router.submit(cluster.request())


@pytest.mark.parametrize(("status", "kind"), [(2, ConfigurationError), (1, UnavailableError)])
async def test_an_instance_that_cannot_start_fails_the_launch_with_its_own_words(make_cluster, status, kind):
    cluster = make_cluster("--fail", "decode-0", "--status", str(status))
    error = await asyncio.wait_for(cluster.launcher.failed, DEADLINE_S)
    assert type(error) is kind
    assert "decode-0 could not start" in str(error)
    assert "the KV pool needs 9 GiB, 4 GiB are free; lower --kv-memory" in str(error)


async def test_a_command_that_is_not_there_fails_the_launch(make_cluster):
    cluster = make_cluster(command=("/no/such/program",))
    error = await asyncio.wait_for(cluster.launcher.failed, DEADLINE_S)
    assert "could not be started: No such file" in str(error)


async def test_a_lack_of_descriptors_is_no_death_of_an_instance(make_cluster, monkeypatch, caplog):
    monkeypatch.setattr("disagg.serve.launch.launcher.FIRST_RETRY_S", 0.001)
    monkeypatch.setattr("disagg.serve.launch.launcher.MAX_RETRY_S", 0.001)
    cluster = await make_cluster().ready()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (4, hard))  # all below are in use
    try:
        os.kill(cluster.launcher.pids[P0], signal.SIGKILL)
        await wait_until(lambda: caplog.text.count("prefill-0 cannot be started now (Too many open files)") > 5)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    request = cluster.request()
    assert await cluster.answer(request) == expected_tokens(request)
    assert [(instance, delay) for instance, _, delay in cluster.memory.lost] == [(P0, 0.0)]


async def test_instances_that_do_not_listen_are_killed(make_cluster, monkeypatch):
    monkeypatch.setattr("disagg.serve.launch.launcher.STOP_S", 0.05)
    monkeypatch.setattr("disagg.serve.launch.launcher.TERMINATE_S", 0.05)
    cluster = await make_cluster("--ignore-stop").ready()
    await cluster.launcher.stop()
    assert not cluster.launcher.pids


async def test_instances_lead_sessions_of_their_own(make_cluster):
    cluster = await make_cluster().ready()
    for pid in cluster.launcher.pids.values():
        assert os.getsid(pid) == os.getpgid(pid) == pid != os.getsid(0)


async def test_an_instance_is_added_and_takes_over_what_another_gives_away(make_cluster):
    cluster = await make_cluster().ready()
    stuck = cluster.request(Behaviour.STUCK_IN_DECODE)
    answer = asyncio.create_task(cluster.answer(stuck))
    await wait_until(lambda: {s.instance: s.num_sequences for s in cluster.router.instances()}[D0] == 1)
    name, words = await cluster.operator.add(Role.DECODE)
    assert name == "decode-1"
    assert words.startswith("decode-1 starts on core ")
    await wait_until(lambda: cluster.states()[name] is InstanceState.READY)
    await cluster.operator.remove(D0, force=False)
    assert await answer == expected_tokens(stuck)
    await wait_until(lambda: cluster.memory.left == [D0])
    assert (set(cluster.states()), set(cluster.launcher.pids)) == ({P0, name}, {P0, name})
    after = cluster.request()
    assert await cluster.answer(after) == expected_tokens(after)
    assert cluster.memory.lost == []


async def test_one_that_is_removed_between_two_lives_is_gone(make_cluster, monkeypatch):
    placement = Placement(groups=(InstanceGroup(role=Role.COLOCATED, count=2),))
    cluster = await make_cluster(placement=placement, max_instance_losses=1).ready()
    victim = InstanceId("colocated-0")
    monkeypatch.setattr(RestartPolicy, "delay_s", lambda *_: 3600.0)
    os.kill(cluster.launcher.pids[victim], signal.SIGKILL)
    await wait_until(lambda: cluster.memory.lost)
    await cluster.operator.remove(victim, force=False)
    await wait_until(lambda: cluster.memory.left == [victim])
    assert set(cluster.states()) == {InstanceId("colocated-1")}


async def test_an_added_instance_that_cannot_start_takes_nobody_along_and_can_be_removed(make_cluster):
    cluster = await make_cluster("--fail", "decode-1").ready()
    name, _ = await cluster.operator.add(Role.DECODE)
    await wait_until(lambda: cluster.states()[name] is InstanceState.GONE)
    assert not cluster.launcher.failed.done()
    assert "the KV pool needs 9 GiB" in next(s.detail for s in cluster.router.instances() if s.instance == name)
    await cluster.operator.remove(name, force=False)
    assert cluster.memory.left == [name]
    assert (await cluster.operator.add(Role.DECODE))[0] == "decode-2", "no name is used twice"


async def test_a_role_is_flipped_in_place_and_survives_a_death(make_cluster):
    placement = Placement(groups=(InstanceGroup(role=Role.PREFILL, count=2), InstanceGroup(role=Role.DECODE, count=1)))
    cluster = await make_cluster(placement=placement).ready()
    with pytest.raises(ConfigurationError, match="as a prefill instance decode-0, no request could be served"):
        await cluster.operator.flip(D0, Role.PREFILL, force=False)
    pids = cluster.launcher.pids
    flipped = InstanceId("prefill-1")
    await cluster.operator.flip(flipped, Role.DECODE, force=False)
    await cluster.operator.drain(D0, force=False)
    request = cluster.request()
    assert await cluster.answer(request) == expected_tokens(request)
    assert cluster.launcher.pids == pids
    os.kill(pids[flipped], signal.SIGKILL)
    await wait_until(lambda: cluster.memory.lost)
    request = cluster.request()
    assert await cluster.answer(request) == expected_tokens(request)
    assert {status.instance: status.role for status in cluster.router.instances()}[flipped] is Role.DECODE
