"""Instances of other hosts at the outer door: admitted, refused in words, kept apart from local ones, let go."""

from collections.abc import Sequence

import pytest
from fake_instance import facts
from msgspec import structs

from disagg.base.config import DType, Quantization, RouterSettings
from disagg.base.errors import ConfigurationError, UnavailableError
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.joining import (
    Admitted,
    AskToJoin,
    AskToLeave,
    EndYourInstance,
    InstanceEnded,
    ModelIdentity,
    NotAdmitted,
    ServerTerms,
    StillHere,
    ToHost,
    decode_for_host,
)
from disagg.base.message_fields import PROTOCOL_VERSION, Message
from disagg.base.messages import Generate, Ready, decode_for_engine, encode
from disagg.base.objectives import Objectives
from disagg.base.request import GenerationRequest, Role
from disagg.base.sampling import SamplingParams
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.membership import MAX_MALFORMED_MESSAGES
from disagg.serve.router.control_socket import Receiver
from disagg.serve.router.live import LiveRouter
from disagg.serve.router.outside import OutsideDoor, TwoDoors, TwoWatchers
from disagg.serve.router.record import LiveStream
from disagg.serve.router.watcher import NullWatcher

OURS = ModelIdentity(fingerprint="ab" * 16, dtype=DType.BFLOAT16, quantization=None, block_size=64)
ASK = AskToJoin(version=PROTOCOL_VERSION, release="0.1.0", role=Role.DECODE, model=OURS, host="beta (10.0.0.2)")
BETA, GAMMA = "host.beta", "host.gamma"
D1 = InstanceId("decode-1")
TERMS = ServerTerms(tells_costs=True, tells_tokens=True, objectives=Objectives(ttft_s=0.5))


class Wire:
    """A control socket whose other ends are the test."""

    address = "10.0.0.1:7000"

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.absent: set[str] = set()

    def open(self, receive: Receiver) -> None:
        self._receive = receive

    def send(self, instance: InstanceId, data: bytes) -> None:
        if instance in self.absent:
            raise UnavailableError("it is not connected")
        self.sent.append((instance, data))

    def close(self) -> None:
        """Nothing is open."""

    def say(self, sender: str, data: bytes | Message) -> None:
        self._receive(InstanceId(sender), data if isinstance(data, bytes) else encode(data))

    def answers(self, host: str) -> Sequence[ToHost]:
        return [decode_for_host(data) for instance, data in self.sent if instance == host]


class Deployment(NullWatcher):
    """Both doors of a server with prefill-0 and decode-0 of its own, and what its router and launcher are told."""

    def __init__(self) -> None:
        self.inner, self.outer = Wire(), Wire()
        self.members: list[tuple[str, Role]] = []
        self.left: list[str] = []
        self.ready: set[str] = set()
        self.returning: list[str] = []
        self.leaving: set[str] = set()
        self.asked_to_leave: list[str] = []
        self.heard: list[tuple[str, bytes]] = []
        self.faulty: list[str] = []
        self.refusal = ""
        self.door = OutsideDoor(self.outer, OURS, TERMS)
        self.door.listener = self
        self.socket = TwoDoors(self.inner, self.door)
        self.socket.open(lambda instance, data: self.heard.append((instance, data)))
        self.watcher = TwoWatchers(self, self.door)

    def instance_joined(self, instance: InstanceId, role: Role) -> None:
        if self.refusal:
            raise ConfigurationError(self.refusal)
        self.members.append((instance, role))

    def instance_asks_to_leave(self, instance: InstanceId) -> None:
        self.asked_to_leave.append(instance)
        if self.refusal:
            raise ConfigurationError(self.refusal)

    def instance_left(self, instance: InstanceId) -> None:
        self.left.append(instance)

    def instance_returns(self, instance: InstanceId, detail: str) -> None:
        self.returning.append(instance)
        if instance in self.leaving:
            self.left.append(instance)

    def has_instance(self, instance: InstanceId) -> bool:
        return instance in ("prefill-0", "decode-0") or (instance in self.door and instance not in self.left)

    def takes_requests(self, instance: InstanceId) -> bool:
        return instance in self.ready

    def instance_faulty(self, instance: InstanceId, why: str) -> None:
        self.faulty.append(instance)


@pytest.fixture
def server() -> Deployment:
    return Deployment()


def test_a_host_is_admitted_under_the_next_free_name(server: Deployment) -> None:
    for number, host in ((1, BETA), (2, GAMMA)):
        server.outer.say(host, ASK)
        assert server.outer.answers(host) == [Admitted(instance=InstanceId(f"decode-{number}"), terms=TERMS)]
    server.outer.say("host.delta", structs.replace(ASK, role=Role.PREFILL))
    assert server.members == [("decode-1", Role.DECODE), ("decode-2", Role.DECODE), ("prefill-1", Role.PREFILL)]


def test_a_host_may_say_how_its_instance_would_be_called(server: Deployment) -> None:
    server.outer.say(BETA, structs.replace(ASK, name="decode-7"))
    server.outer.say(GAMMA, structs.replace(ASK, name="decode-0"))
    server.outer.say("host.delta", structs.replace(ASK, name="host.gamma"))
    assert [name for name, _ in server.members] == ["decode-7", "decode-1", "decode-2"], "taken, or a host's"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (structs.replace(ASK, version=1), f"another protocol: the server speaks version {PROTOCOL_VERSION}"),
        (structs.replace(ASK, model=structs.replace(OURS, fingerprint="cd")), "another model or other weights"),
        (structs.replace(ASK, model=structs.replace(OURS, dtype=DType.FLOAT32)), "--dtype: the server has bfloat16"),
        (structs.replace(ASK, model=structs.replace(OURS, quantization=Quantization.INT8)), "this host int8"),
        (
            structs.replace(ASK, model=structs.replace(OURS, block_size=48)),
            "the server has blocks of 64 and of 48 tokens",
        ),
    ],
)
def test_what_would_not_fit_is_refused_in_words(server: Deployment, asked: AskToJoin, words: str) -> None:
    server.outer.say(BETA, asked)
    (answer,) = server.outer.answers(BETA)
    assert isinstance(answer, NotAdmitted)
    assert words in answer.why
    assert server.members == []


def test_what_the_router_refuses_is_told(server: Deployment) -> None:
    server.refusal = "there is an instance decode-1 already"
    server.outer.say(BETA, ASK)
    assert server.outer.answers(BETA) == [NotAdmitted(why=server.refusal)]
    assert D1 not in server.door


def test_messages_go_to_and_from_an_admitted_instance(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say("decode-1", b"hello")
    server.inner.say("decode-0", b"local")
    assert server.heard == [("decode-1", b"hello"), ("decode-0", b"local")]
    server.socket.send(D1, b"there")
    server.socket.send(InstanceId("decode-0"), b"here")
    assert server.outer.sent[-1] == ("decode-1", b"there")
    assert server.inner.sent == [("decode-0", b"here")]


def test_nobody_outside_speaks_for_a_local_instance_and_the_reverse(server: Deployment) -> None:
    server.outer.say("decode-0", b"forged")
    server.outer.say("decode-1", b"not admitted yet")
    server.outer.say(BETA, ASK)
    server.inner.say("decode-1", b"forged")
    assert server.heard == []


def test_a_host_whose_instance_ended_gives_up_the_name(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, InstanceEnded(detail="killed by SIGKILL"))
    assert server.left == ["decode-1"]
    server.outer.say("decode-1", b"late")
    assert server.heard == []
    server.outer.say(BETA, ASK)
    assert server.members == [("decode-1", Role.DECODE)] * 2


def test_a_host_that_is_to_stop_keeps_its_name_until_its_instance_holds_nothing(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, AskToLeave())
    assert (server.asked_to_leave, server.left) == (["decode-1"], [])
    server.refusal = "decode-1 is being removed already"
    server.outer.say(BETA, AskToLeave())
    server.watcher.instance_leaving(D1)
    last = server.outer.answers(BETA)[-1]
    assert isinstance(last, EndYourInstance)
    assert last.for_good, "it does not ask to join anew"
    assert server.left == ["decode-1"]


def test_nobody_leaves_for_another(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(GAMMA, AskToLeave())
    assert server.asked_to_leave == []


def test_a_host_that_asks_anew_has_lost_its_instance(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, ASK)
    assert server.left == ["decode-1"]
    assert server.outer.answers(BETA) == [Admitted(instance=D1, terms=TERMS)] * 2


def test_signs_of_life_are_answered_to_those_who_belong(server: Deployment) -> None:
    server.outer.say(BETA, StillHere())
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, StillHere())
    assert server.outer.answers(BETA)[0] == EndYourInstance(why="the server does not know it")
    assert server.outer.answers(BETA)[-1] == StillHere(takes_requests=False)
    server.ready.add(D1)
    server.outer.say(BETA, StillHere())
    assert server.outer.answers(BETA)[-1] == StillHere(takes_requests=True)


def test_an_instance_that_fell_silent_is_ended_and_awaited_under_its_name(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.watcher.instance_faulty(D1, "no sign of life for 30 s")
    assert server.outer.answers(BETA)[-1] == EndYourInstance(why="no sign of life for 30 s")
    assert (server.returning, server.left, server.faulty) == (["decode-1"], [], [])
    server.outer.say("decode-1", b"late")
    server.outer.say(BETA, InstanceEnded(detail="it was told to"))
    assert (server.heard, server.left) == ([], []), "its host has said nothing of the next one yet"
    server.outer.say("host.beta-again", structs.replace(ASK, name="decode-1"))
    assert server.outer.answers("host.beta-again") == [Admitted(instance=D1, terms=TERMS)]
    server.watcher.instance_faulty(InstanceId("decode-0"), "broken")
    assert server.faulty == ["decode-0"]


def test_the_name_of_an_instance_that_left_while_it_was_awaited_is_free(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.watcher.instance_faulty(D1, "no sign of life for 30 s")
    server.watcher.instance_left(D1)
    assert D1 not in server.door
    server.outer.say(GAMMA, ASK)
    assert server.members == [("decode-1", Role.DECODE)] * 2


def test_an_instance_that_is_expected_belongs_before_it_joins(server: Deployment) -> None:
    assert server.door.expect(Role.DECODE, "a cluster") == "decode-1"
    assert server.members == [("decode-1", Role.DECODE)]
    server.outer.say(GAMMA, ASK)
    server.outer.say(BETA, structs.replace(ASK, name="decode-1"))
    assert server.outer.answers(BETA) == [Admitted(instance=D1, terms=TERMS)]
    assert server.members == [("decode-1", Role.DECODE), ("decode-2", Role.DECODE)], "nobody else took its name"


def test_an_instance_that_somebody_saw_die_is_gone_or_awaited(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.door.lost(D1, "its node is gone", returns=True)
    assert (server.returning, server.left) == (["decode-1"], [])
    server.door.lost(D1, "there is no other node", returns=False)
    server.door.lost(D1, "said twice", returns=False)
    assert server.left == ["decode-1"]


def test_an_instance_that_is_to_return_keeps_its_name_until_then(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, InstanceEnded(detail="killed by SIGKILL", returns=True))
    assert (server.returning, server.left) == (["decode-1"], [])
    server.outer.say(GAMMA, ASK)
    server.outer.say("host.other-role", structs.replace(ASK, role=Role.PREFILL, name="decode-1"))
    server.outer.say("host.beta-again", structs.replace(ASK, name="decode-1"))
    assert server.outer.answers("host.beta-again") == [Admitted(instance=D1, terms=TERMS)]
    assert [name for name, _ in server.members] == ["decode-1", "decode-2", "prefill-1"], "it did not join twice"
    server.outer.say("host.beta-again", StillHere())
    assert server.outer.answers("host.beta-again")[-1] == StillHere()


def test_an_instance_that_was_to_leave_is_not_awaited(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.leaving.add("decode-1")
    server.outer.say(BETA, InstanceEnded(detail="killed by SIGKILL", returns=True))
    assert D1 not in server.door


def test_an_instance_that_did_not_return_is_let_go(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.say(BETA, InstanceEnded(detail="killed by SIGKILL", returns=True))
    server.watcher.instance_faulty(D1, "no sign of life for 300 s while starting")
    assert (server.left, server.faulty) == (["decode-1"], [])


def test_a_host_that_is_gone_is_awaited_and_then_let_go_all_the_same(server: Deployment) -> None:
    server.outer.say(BETA, ASK)
    server.outer.absent.add(BETA)
    server.watcher.instance_faulty(D1, "no sign of life for 30 s")
    assert server.left == []
    server.watcher.instance_faulty(D1, "no sign of life for 300 s while starting")
    assert server.left == ["decode-1"]


class Guests:
    """A real router whose prefill and decode instance are both on other hosts, and ready."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.door = OutsideDoor(self.wire, OURS, TERMS)
        self.router = LiveRouter({}, RouterSettings(), TwoDoors(Wire(), self.door))
        self.door.listener = self.router
        self.router.start(TwoWatchers(NullWatcher(), self.door))
        for role in (Role.PREFILL, Role.DECODE):
            self.join(role, "first")

    def join(self, role: Role, life: str) -> None:
        name = InstanceId(f"{role.value}-0")
        self.wire.say(f"host.{role.value}.{life}", structs.replace(ASK, role=role, name=name))
        ready = Ready(version=PROTOCOL_VERSION, instance=name, role=role, incarnation=life, facts=facts())
        self.wire.say(name, ready)

    def submit(self, name: str) -> LiveStream:
        return self.router.submit(
            GenerationRequest(
                request_id=RequestId(name),
                epoch=Epoch(0),
                prompt_token_ids=(1, 2),
                sampling=SamplingParams(max_tokens=4, seed=0),
            )
        )

    def lose_prefill(self) -> None:
        for _ in range(MAX_MALFORMED_MESSAGES):
            self.wire.say("prefill-0", b"nonsense")

    def states(self) -> dict[str, InstanceState]:
        return {one.instance: one.state for one in self.router.instances()}


async def test_requests_wait_for_a_guest_that_is_the_only_one_of_its_role_and_was_ended() -> None:
    guests = Guests()
    guests.lose_prefill()
    assert guests.states() == {"prefill-0": InstanceState.STARTING, "decode-0": InstanceState.READY}
    waiting = guests.submit("a")
    assert not waiting.is_ended
    guests.join(Role.PREFILL, "second")
    name, data = guests.wire.sent[-1]
    sent = decode_for_engine(data)
    assert (name, type(sent)) == ("prefill-0", Generate)
    guests.router.close()


async def test_a_guest_that_was_to_leave_is_not_awaited() -> None:
    guests = Guests()
    guests.submit("a")
    guests.wire.say("host.prefill.first", AskToLeave())
    guests.lose_prefill()
    assert guests.states() == {"decode-0": InstanceState.READY}
    assert InstanceId("prefill-0") not in guests.door
    guests.router.close()


def test_bytes_that_are_no_message_are_answered_in_words(server: Deployment) -> None:
    server.outer.say(BETA, b"\x81\xa4type\xa3Foo")
    (answer,) = server.outer.answers(BETA)
    assert isinstance(answer, NotAdmitted)
    assert "does not understand" in answer.why
