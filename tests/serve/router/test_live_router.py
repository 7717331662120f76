"""The live router over real sockets; instances and API are played by the tests."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio
import zmq.asyncio
from msgspec import structs
from reading import outputs
from scripted_peer import DEADLINE_S, ScriptedPeer, make_request

from disagg.base.clock import Clock
from disagg.base.config import RouterSettings
from disagg.base.errors import (
    ContextLengthError,
    InstanceLostError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    UnavailableError,
)
from disagg.base.ids import InstanceId
from disagg.base.messages import (
    Abort,
    Adopt,
    Failed,
    FailureKind,
    Generate,
    InstanceFacts,
    InstanceLoad,
    Loading,
    LoadReport,
    PeerLost,
    Release,
    StageStamps,
    Stop,
)
from disagg.base.request import Role
from disagg.base.sampling import FinishReason
from disagg.measure.timeline import Stage
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.event_log import parse_log, replay
from disagg.scheduling.router.outputs import DropReason, HandOverEnded
from disagg.serve.router.control_socket import ZmqControlSocket
from disagg.serve.router.interface import Router, ServedBy
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.sink import NullSink
from disagg.serve.router.watcher import NullWatcher

PAIR = {InstanceId("prefill-0"): Role.PREFILL, InstanceId("decode-0"): Role.DECODE}


class ManualClock:
    """Time as the test sets it."""

    now_s = 0.0

    def now(self) -> float:
        return self.now_s


class Tally(NullSink, NullWatcher):
    """A sink and watcher that remembers everything it is told."""

    def __init__(self) -> None:
        self.hand_overs: list[tuple[str, str, int, str]] = []
        self.dropped: list[tuple[str, DropReason]] = []
        self.lost: list[str] = []
        self.num_resumed = 0
        self.num_migrated = 0
        self.pauses: list[float] = []
        self.faulty: dict[str, str] = {}
        self.loading: list[tuple[str, str, float]] = []
        self.ready: list[str] = []

    def hand_over_ended(self, ended: HandOverEnded) -> None:
        self.hand_overs.append((ended.source, ended.target, ended.num_bytes, ended.failure))

    def message_dropped(self, instance: InstanceId, reason: DropReason) -> None:
        self.dropped.append((instance, reason))

    def instance_lost(self, instance: InstanceId) -> None:
        self.lost.append(instance)

    def sequence_resumed(self) -> None:
        self.num_resumed += 1

    def sequence_migrated(self) -> None:
        self.num_migrated += 1

    def pause_ended(self, pause_s: float) -> None:
        self.pauses.append(pause_s)

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        self.loading.append((instance, stage, fraction))

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        self.ready.append(instance)

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        self.faulty[instance] = why


async def wait_until(condition: Callable[[], object]) -> None:
    """Let the event loop turn until the condition holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0)


class Scene:
    """A router and its scripted instances."""

    def __init__(
        self, folder: Path, instances: dict[InstanceId, Role], settings: RouterSettings, clock: Clock | None
    ) -> None:
        self.endpoint = f"ipc://{folder}/control"
        self.log_path = folder / "router.jsonl"
        self.tally = Tally()
        self.router = LiveRouter(
            instances, settings, ZmqControlSocket(self.endpoint), sink=self.tally, event_log=self.log_path, clock=clock
        )
        self.context = zmq.asyncio.Context()
        self.peers: list[ScriptedPeer] = []

    def peer(self, name: str, incarnation: str = "1") -> ScriptedPeer:
        peer = ScriptedPeer(self.context, self.endpoint, name, incarnation)
        self.peers.append(peer)
        return peer

    async def ready_peer(self, name: str, incarnation: str = "1", **facts: int) -> ScriptedPeer:
        peer = self.peer(name, incarnation)
        num_ready = len(self.tally.ready)
        await peer.get_ready(**facts)
        await wait_until(lambda: len(self.tally.ready) > num_ready)
        return peer

    def state(self, name: str) -> InstanceState:
        (status,) = [status for status in self.router.instances() if status.instance == name]
        return status.state

    def close(self) -> None:
        self.router.close()
        for peer in self.peers:
            peer.close()
        self.context.term()
        with self.log_path.open("rb") as lines:
            difference = replay(parse_log(lines))
        assert difference is None, "whatever happened, the log of it gives the same actions again"


MakeScene = Callable[..., Scene]


@pytest_asyncio.fixture
async def make_scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MakeScene]:
    with contextlib.ExitStack() as scenes:

        def make(instances: dict[InstanceId, Role] = PAIR, clock: Clock | None = None, **settings: float) -> Scene:
            scene = Scene(tmp_path_factory.mktemp("s"), instances, RouterSettings(**settings), clock)
            scenes.callback(scene.close)
            scene.router.start(scene.tally)
            return scene

        yield make


@pytest_asyncio.fixture
async def scene(make_scene: MakeScene) -> Scene:
    return make_scene()


async def prefilled(scene: Scene, prefill: ScriptedPeer, name: str = "a"):
    """Bring a sequence to its first token."""
    request = make_request(name)
    stream = scene.router.submit(request)
    await prefill.expect(Generate)
    await prefill.emit(request, 11)
    assert (await anext(outputs(stream))).token_ids == (11,)
    return request, stream


async def adopted(scene: Scene, prefill: ScriptedPeer, decode: ScriptedPeer, name: str = "a"):
    """Bring a sequence to its decode instance."""
    request, stream = await prefilled(scene, prefill, name)
    await prefill.offer(request)
    await decode.expect(Adopt)
    return request, stream


async def test_prefill_here_decode_there(scene):
    router: Router = scene.router
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    assert router.is_ready()

    request = make_request("a", arrival_s=10.0)
    stream = router.submit(request)
    assert await prefill.expect(Generate) == Generate(request=request, hand_over=True)
    await prefill.emit(request, 11, stamps=StageStamps(received_s=10.5, scheduled_s=11.0, first_step_done_s=13.0))
    assert (await anext(outputs(stream))).token_ids == (11,)  # before anything is handed over

    offer = await prefill.offer(request)
    adopt = await decode.expect(Adopt)
    assert structs.replace(adopt.offer, answer_age_s=0.0) == offer
    assert adopt.offer.answer_age_s >= 0
    assert adopt.request.output_token_ids == (11,)
    await decode.pulled(request, prefill)
    assert (await prefill.expect(Release)).request_id == "a"

    stamps = StageStamps(13.25, pull_started_s=14.0, pulled_s=16.0, scheduled_s=17.0, first_step_done_s=19.0)
    await decode.emit(request, 12, stamps=stamps)
    await decode.emit(request, 13, 14, finished=FinishReason.STOP)
    assert [output.token_ids async for output in outputs(stream)] == [(12,), (13, 14)]

    assert stream.served_by == ServedBy(InstanceId("prefill-0"), InstanceId("decode-0"))
    stages = stream.timeline.stages()
    assert sum(stages.values()) == pytest.approx(stream.timeline.finished_s - 10.0)
    assert stages.pop(Stage.PAUSE) == 0.0
    del stages[Stage.DECODE], stages[Stage.DELIVERY]  # stamped by the router's own clock
    assert list(stages.values()) == [1.0, 2.0, 0.25, 0.75, 2.0, 1.0, 2.0]
    assert scene.tally.hand_overs == [("prefill-0", "decode-0", 4096, "")]


async def test_a_colocated_instance_stamps_a_timeline_without_hand_over(make_scene):
    scene = make_scene({InstanceId("colocated-0"): Role.COLOCATED})
    peer = await scene.ready_peer("colocated-0")
    request = make_request("a", arrival_s=10.0)
    stream = scene.router.submit(request)
    assert not (await peer.expect(Generate)).hand_over
    await peer.emit(request, 11, stamps=StageStamps(scheduled_s=11.0, first_step_done_s=13.0))
    await peer.emit(request, 12)
    await peer.emit(request, finished=FinishReason.ABORT)
    assert [output.token_ids async for output in outputs(stream)] == [(11,), (12,), ()]
    assert stream.served_by == ServedBy(InstanceId("colocated-0"), InstanceId("colocated-0"))
    stages = stream.timeline.stages()
    assert stages[Stage.QUEUE_PREFILL] == 1.0
    assert stages[Stage.HAND_OVER] == 0.0
    assert not math.isnan(sum(stages.values()))


async def test_aborting_reaches_the_instance_in_every_state(scene):
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")

    scene.router.submit(make_request("prefilling"))
    await prefill.expect(Generate)
    scene.router.abort("prefilling")
    assert (await prefill.expect(Abort)).request_id == "prefilling"

    request, _ = await prefilled(scene, prefill, "offering")
    scene.router.abort("offering")
    await prefill.expect(Abort)
    await prefill.offer(request)  # it was on its way
    assert (await prefill.expect(Release)).request_id == "offering"

    await adopted(scene, prefill, decode, "pulling")
    scene.router.abort("pulling")
    assert (await decode.expect(Abort)).request_id == "pulling"
    assert (await prefill.expect(Release)).request_id == "pulling"

    request, stream = await adopted(scene, prefill, decode, "decoding")
    await decode.pulled(request, prefill)
    await prefill.expect(Release)
    scene.router.abort("decoding")
    assert (await decode.expect(Abort)).request_id == "decoding"
    assert [output async for output in outputs(stream)] == []

    scene.router.abort("never heard of")


async def test_outputs_after_an_abort_or_of_another_epoch_are_dropped_and_counted(scene):
    prefill = await scene.ready_peer("prefill-0")
    gone, stays = make_request("gone"), make_request("stays")
    scene.router.submit(gone)
    stream = scene.router.submit(stays)
    scene.router.abort("gone")
    await prefill.emit(gone, 1)
    await prefill.emit(stays, 2, epoch=1)
    await prefill.emit(stays, 3, finished=FinishReason.STOP)
    assert [output.token_ids async for output in outputs(stream)] == [(3,)]
    assert scene.tally.dropped == [("prefill-0", DropReason.STALE)] * 2


async def test_a_failed_pull_is_reported_and_does_no_harm(scene):
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    request, stream = await adopted(scene, prefill, decode)
    await decode.pulled(request, prefill, failure="digest of block 3 differs")
    await prefill.expect(Release)
    await decode.emit(request, 12, finished=FinishReason.STOP)
    assert [output.token_ids async for output in outputs(stream)] == [(12,)]
    assert scene.tally.hand_overs == [("prefill-0", "decode-0", 0, "digest of block 3 differs")]


async def test_what_an_instance_that_exits_held_goes_on_from_its_tokens_and_the_others_are_told(scene):
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    request, stream = await adopted(scene, prefill, decode)
    await decode.emit(request, 12)
    assert (await anext(outputs(stream))).token_ids == (12,)
    scene.router.instance_exited(InstanceId("decode-0"), "killed by SIGKILL")
    assert await prefill.expect(PeerLost) == PeerLost(instance=InstanceId("decode-0"), incarnation="1")
    assert (await prefill.expect(Release)).request_id == "a"
    assert scene.state("decode-0") is InstanceState.LOST
    assert scene.tally.lost == ["decode-0"]
    assert not scene.router.is_ready()
    again = (await prefill.expect(Generate)).request
    assert (again.epoch, again.output_token_ids) == (1, (11, 12))
    await prefill.emit(request, 99)  # of the attempt that ended
    await prefill.emit(again, 13, finished=FinishReason.STOP, epoch=1)
    assert [output.token_ids async for output in outputs(stream)] == [(13,)]
    assert scene.tally.dropped == [("prefill-0", DropReason.STALE)]
    assert (scene.tally.num_resumed, len(scene.tally.pauses)) == (1, 1)
    assert sum(stream.timeline.stages().values()) == pytest.approx(
        stream.timeline.finished_s - stream.timeline.arrival_s
    )


async def test_a_restarted_instance_serves_what_waited_for_it(scene):
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    scene.router.instance_exited(InstanceId("decode-0"), "killed by SIGKILL")
    await prefill.expect(PeerLost)
    decode.close()
    request, stream = await prefilled(scene, prefill)
    await prefill.offer(request)
    scene.router.instance_starting(InstanceId("decode-0"))
    assert scene.state("decode-0") is InstanceState.STARTING
    reborn = await scene.ready_peer("decode-0", incarnation="2")
    await reborn.expect(Adopt)
    await reborn.emit(request, 12, finished=FinishReason.STOP)
    assert [output.token_ids async for output in outputs(stream)] == [(12,)]
    (status,) = [status for status in scene.router.instances() if status.instance == "decode-0"]
    assert (status.state, status.num_restarts) == (InstanceState.READY, 1)


async def test_a_second_ready_of_a_new_incarnation_means_that_the_old_one_died(make_scene):
    scene = make_scene(max_instance_losses=1)
    prefill = await scene.ready_peer("prefill-0")
    stream = scene.router.submit(make_request("a"))
    await prefill.expect(Generate)
    await scene.ready_peer("prefill-0", incarnation="2")
    with pytest.raises(InstanceLostError):
        await anext(outputs(stream))


async def test_a_silent_instance_is_treated_as_dead(make_scene):
    scene = make_scene(instance_timeout_s=0.05, max_instance_losses=1)
    prefill = await scene.ready_peer("prefill-0")
    stream = scene.router.submit(make_request("a"))
    await prefill.expect(Generate)
    with pytest.raises(InstanceLostError, match=r"no sign of life for 0\.05 s"):
        await anext(outputs(stream))
    assert "no sign of life" in scene.tally.faulty["prefill-0"]
    assert scene.state("prefill-0") is InstanceState.LOST


async def test_instances_are_not_blamed_when_the_router_itself_stood_still(make_scene):
    clock = ManualClock()
    scene = make_scene(clock=clock, instance_timeout_s=30.0)
    await scene.ready_peer("prefill-0")
    clock.now_s += 1000.0  # a suspended laptop, a stopped process
    scene.router.tick()
    assert not scene.tally.faulty
    for _ in range(32):  # looked for in time, and heard of nothing
        clock.now_s += 1.0
        scene.router.tick()
    assert "prefill-0" in scene.tally.faulty


async def test_a_start_that_gets_nowhere_is_a_fault(make_scene):
    scene = make_scene(start_timeout_s=0.05)
    peer = scene.peer("prefill-0")
    await peer.say(Loading(instance=peer.instance, stage="weights", fraction=0.5))
    await wait_until(lambda: scene.tally.faulty)
    assert any("no sign of life" in why for why in scene.tally.faulty.values())


async def test_load_reports_are_shown_and_those_of_another_life_are_not(scene):
    prefill = await scene.ready_peer("prefill-0")
    for incarnation, num_running in (("1", 5), ("0", 9)):
        load = InstanceLoad(num_running=num_running)
        await prefill.say(LoadReport(instance=prefill.instance, incarnation=incarnation, load=load))
    await wait_until(lambda: scene.tally.dropped)
    assert scene.router.instances()[0].load.num_running == 5


async def test_loading_is_passed_on(scene):
    peer = scene.peer("prefill-0")
    await peer.say(Loading(instance=peer.instance, stage="weights", fraction=0.5))
    await wait_until(lambda: scene.tally.loading)
    assert scene.tally.loading == [("prefill-0", "weights", 0.5)]
    assert scene.router.instances()[0].detail == "weights"


@pytest.mark.parametrize(
    "frames", [(b"nonsense",), (b"",), (b"\x80",), (b"two", b"frames")], ids=["text", "empty", "untagged", "frames"]
)
async def test_malformed_messages_are_counted_and_their_repetition_is_a_fault(make_scene, frames):
    scene = make_scene(max_instance_losses=1)
    prefill = await scene.ready_peer("prefill-0")
    stream = scene.router.submit(make_request("a"))
    await prefill.expect(Generate)
    await prefill.say_bytes(*frames)
    await wait_until(lambda: scene.tally.dropped)
    assert scene.state("prefill-0") is InstanceState.READY  # once can happen
    await prefill.say_bytes(*frames)
    await prefill.say_bytes(*frames)
    with pytest.raises(InstanceLostError, match="3 malformed messages"):
        await anext(outputs(stream))
    assert scene.tally.dropped == [("prefill-0", DropReason.MALFORMED)] * 3


async def test_a_stranger_is_not_listened_to(scene):
    stranger = scene.peer("prefill-7")
    await stranger.get_ready()
    prefill = await scene.ready_peer("prefill-0")
    assert scene.tally.ready == ["prefill-0"]
    assert scene.router.submit(make_request("a"))
    await prefill.expect(Generate)


async def test_an_instance_of_another_version_is_refused(scene):
    await scene.peer("prefill-0").get_ready(version=99)
    await wait_until(lambda: scene.tally.faulty)
    assert "protocol version 99" in scene.tally.faulty["prefill-0"]


async def test_an_impossible_message_ends_the_instance_and_not_the_server(make_scene):
    scene = make_scene(max_instance_losses=1)
    prefill, decode = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    request, stream = await prefilled(scene, prefill)
    await prefill.emit(request, 12)  # a prefill instance stops after the first token
    with pytest.raises(InstanceLostError, match="broke the protocol"):
        await anext(outputs(stream))
    assert (await decode.expect(PeerLost)).instance == "prefill-0"
    assert scene.state("decode-0") is InstanceState.READY


async def test_an_offer_in_another_name_is_a_fault(make_scene):
    scene = make_scene(max_instance_losses=1)
    prefill = await scene.ready_peer("prefill-0")
    request, stream = await prefilled(scene, prefill)
    await prefill.offer(request, incarnation="0")
    with pytest.raises(InstanceLostError, match="offered blocks of prefill-0 0"):
        await anext(outputs(stream))


async def test_a_sequence_given_back_raises_what_went_wrong(scene):
    prefill = await scene.ready_peer("prefill-0")
    for name, kind, error in (
        ("a", FailureKind.TOO_LONG, ContextLengthError),
        ("b", FailureKind.INTERNAL, InternalError),
        ("c", FailureKind.INVALID, InvalidRequestError),
    ):
        request = make_request(name)
        stream = scene.router.submit(request)
        await prefill.say(Failed(request_id=request.request_id, epoch=request.epoch, kind=kind, message="no room"))
        with pytest.raises(error, match="no room"):
            await anext(outputs(stream))


async def test_what_no_pool_can_hold_is_refused_with_the_sizes(scene):
    await scene.ready_peer("prefill-0", max_model_len=100)
    await scene.ready_peer("decode-0", max_model_len=100)
    with pytest.raises(ContextLengthError, match="103 tokens"):
        await anext(outputs(scene.router.submit(make_request("a", max_tokens=100))))


async def test_the_deadline_of_a_request(make_scene):
    scene = make_scene(request_timeout_s=0.05)
    prefill = await scene.ready_peer("prefill-0")
    stream = scene.router.submit(make_request("a"))
    await prefill.expect(Generate)
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        await anext(outputs(stream))
    await prefill.expect(Abort)


async def test_waiting_for_an_instance_ends_in_503(make_scene):
    scene = make_scene(instance_wait_s=0.05)
    with pytest.raises(UnavailableError, match=r"prefill-0: starting"):
        await anext(outputs(scene.router.submit(make_request("a"))))


async def test_the_bound_is_429(make_scene):
    scene = make_scene(max_queued_requests=1)
    scene.router.submit(make_request("a"))
    with pytest.raises(OverloadedError, match="--max-queued-requests"):
        scene.router.submit(make_request("b"))
    with pytest.raises(InternalError, match="twice"):
        scene.router.submit(make_request("a"))
    scene.router.abort("a")
    scene.router.submit(make_request("b"))


async def test_when_everybody_is_given_up_requests_are_refused_at_once(scene):
    scene.router.instance_exited(InstanceId("prefill-0"), "it could not start")
    with pytest.raises(UnavailableError, match="prefill-0: gone"):
        scene.router.submit(make_request("a"))


async def test_a_slow_reader_loses_nothing_even_if_the_sequence_fails(scene):
    prefill = await scene.ready_peer("prefill-0")
    request = make_request("a")
    stream = scene.router.submit(request)
    await prefill.expect(Generate)
    await prefill.emit(request, 11)
    await prefill.say(
        Failed(request_id=request.request_id, epoch=request.epoch, kind=FailureKind.INTERNAL, message="fault")
    )
    await prefill.say_bytes(b"nonsense")
    await wait_until(lambda: scene.tally.dropped)  # all of the above was handled
    assert (await anext(outputs(stream))).token_ids == (11,)
    with pytest.raises(InternalError, match="fault"):
        await anext(outputs(stream))


async def test_draining_waits_for_what_is_under_way(scene):
    prefill, _ = await scene.ready_peer("prefill-0"), await scene.ready_peer("decode-0")
    request = make_request("a")
    stream = scene.router.submit(request)
    await prefill.expect(Generate)
    draining = asyncio.create_task(scene.router.drain(DEADLINE_S))
    await wait_until(lambda: not scene.router.is_ready())
    with pytest.raises(UnavailableError, match="stopping"):
        scene.router.submit(make_request("b"))
    await prefill.emit(request, 11, finished=FinishReason.STOP)
    assert await draining
    assert [output.token_ids async for output in outputs(stream)] == [(11,)]


async def test_draining_fails_what_does_not_finish_and_stopping_reaches_the_instances(scene):
    prefill = await scene.ready_peer("prefill-0")
    stream = scene.router.submit(make_request("a"))
    await prefill.expect(Generate)
    assert not await scene.router.drain(0.0)
    with pytest.raises(UnavailableError, match="stopping"):
        await anext(outputs(stream))
    await prefill.expect(Abort)
    scene.router.stop_instances()
    await prefill.expect(Stop)
