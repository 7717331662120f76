"""Dispatch against every order of arrivals, deaths, cancellations and late messages that hypothesis can think of.

The test plays all instances: it remembers what each live one was told, and answers like an engine would. Instances are
drained and change their roles meanwhile. Whatever happens, every sequence ends exactly once, and through however many
attempts all tokens of the current one are delivered and none of an earlier; only live instances are spoken to, and no
load is left over.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg.base.config import RouterSettings
from disagg.base.ids import Epoch, InstanceId, RequestId
from disagg.base.messages import FailureKind
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import (
    Drained,
    Fail,
    Finish,
    Refuse,
    Resume,
    SendAbort,
    SendAdopt,
    SendGenerate,
    SendMigrate,
    SendPart,
    SendPeerLost,
    SendRelease,
)
from disagg.scheduling.dispatch.dispatcher import Dispatcher
from disagg.scheduling.dispatch.events import (
    ChangeRole,
    Drain,
    InstanceDown,
    InstanceUp,
    OfferMade,
    PartMade,
    Progress,
    PullEnded,
    SequenceArrived,
    SequenceCancelled,
    SequenceFailed,
    TokensEmitted,
    Undrain,
)
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState
from disagg.scheduling.step.events import Tick

LIMITS = RouterSettings(max_queued_requests=6, request_timeout_s=50.0, instance_wait_s=10.0)
INSTANCES = {
    InstanceId(name): role
    for name, role in (
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("decode-1", Role.DECODE),
        ("colocated-0", Role.COLOCATED),
    )
}


class DispatchMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.names = 0
        self.open: set[RequestId] = set()
        self.epochs: dict[RequestId, Epoch] = {}
        self.tokens: dict[RequestId, int] = {}
        """Known to whoever waits for the sequence, prompt included."""
        self.losses: dict[RequestId, int] = {}
        self.live: set[InstanceId] = set()
        self.jobs: dict[tuple[InstanceId, RequestId], str] = {}
        """What a live instance is doing with a sequence: prefill, offering, early, pull, decode, all, or migrate."""
        self.visited: set[tuple[RequestId, Epoch, InstanceId]] = set()
        """Who was given which attempt: nobody twice."""
        self.leases: set[tuple[InstanceId, RequestId]] = set()

    @initialize(pairs=st.booleans(), colocated=st.booleans())
    def configure(self, pairs: bool, colocated: bool) -> None:
        chosen = {
            name: role
            for name, role in INSTANCES.items()
            if (colocated if role is Role.COLOCATED else pairs or not colocated)
        }
        self.instances = chosen
        self.dispatcher = Dispatcher(chosen, LIMITS)
        for name in chosen:
            self.handle(InstanceUp(instance=name, max_total_tokens=100))

    # What the dispatcher wants done ---------------------------------------------------------------------------

    def handle(self, event) -> None:
        if isinstance(event, InstanceUp):
            self.live.add(event.instance)
        for action in self.dispatcher.handle(event, self.now):
            self.carry_out(action)
        self.dispatcher.validate()

    def carry_out(self, action) -> None:
        told = SendGenerate | SendAdopt | SendPart | SendAbort | SendRelease | SendMigrate | SendPeerLost
        if isinstance(action, told):
            assert action.instance in self.live, f"{action} goes to a dead instance"
        if isinstance(action, SendGenerate | SendAdopt | SendPart):
            self.give(action)
        match action:
            case SendGenerate():
                role = self.instances[action.instance]
                assert action.hand_over == (role is Role.PREFILL)
                assert role is not Role.DECODE or action.epoch
                self.jobs[action.instance, action.request_id] = "prefill" if action.hand_over else "all"
            case SendAdopt():
                assert self.instances[action.instance] is not Role.PREFILL
                self.jobs[action.instance, action.request_id] = "pull"
            case SendAbort():
                del self.jobs[action.instance, action.request_id]
            case SendRelease():
                self.leases.discard((action.instance, action.request_id))
            case Resume():
                assert action.epoch == self.epochs[action.request_id] + 1
                self.epochs[action.request_id] = action.epoch
                assert not any(name == action.request_id for _, name in [*self.jobs, *self.held_after_loss()])
                self.losses[action.request_id] += " died: " in action.why
                assert self.losses[action.request_id] < LIMITS.max_instance_losses
            case Finish() | Fail() | Refuse():
                assert action.epoch == self.epochs[action.request_id]
                assert action.request_id in self.open, f"{action} ends a sequence that had ended"
                self.open.remove(action.request_id)
            case SendMigrate():
                assert self.jobs[action.instance, action.request_id] in ("decode", "all")
                self.jobs[action.instance, action.request_id] = "migrate"
            case Drained(instance=instance):
                assert not any(holder == instance for holder, _ in [*self.jobs, *self.leases])
            case SendPeerLost():
                assert action.lost not in self.live

    def give(self, action) -> None:
        """Check what holds for whoever is given a sequence, or goes on with what it reads already."""
        if self.jobs.get((action.instance, action.request_id)) == "early":
            assert isinstance(action, SendAdopt) or not action.is_first
            return
        if isinstance(action, SendPart):
            assert action.is_first
            assert self.instances[action.instance] is not Role.PREFILL
            self.jobs[action.instance, action.request_id] = "early"
        attempt = (action.request_id, action.epoch, action.instance)
        assert attempt not in self.visited, "it remembers that this attempt ended"
        self.visited.add(attempt)
        assert self.entry(action.instance).state is InstanceState.READY
        assert action.epoch == self.epochs[action.request_id]

    def entry(self, instance: InstanceId) -> InstanceEntry:
        return next(entry for entry in self.dispatcher.instances if entry.instance == instance)

    def held_after_loss(self) -> set[tuple[InstanceId, RequestId]]:
        """Return the leases on live instances: a resumed sequence has none."""
        return {lease for lease in self.leases if lease[0] in self.live}

    def step(self, instance: InstanceId, name: RequestId, num_tokens: int, finished: bool) -> None:
        """Let an instance bring tokens: all are delivered."""
        epoch = self.epochs[name]
        progress = (Progress(name, epoch, num_tokens, finished),)
        before = self.dispatcher.num_sequences
        self.handle(TokensEmitted(instance=instance, progress=progress))
        assert self.dispatcher.num_sequences == before - finished
        self.tokens[name] += num_tokens

    # What the world does --------------------------------------------------------------------------------------

    @rule(
        lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4),
        priority=st.booleans(),
    )
    def arrive(self, lengths: list[tuple[int, int]], priority: bool) -> None:
        for num_tokens, more in lengths:
            self.names += 1
            name = RequestId(f"s{self.names}")
            self.open.add(name)
            self.epochs[name], self.losses[name], self.tokens[name] = Epoch(0), 0, num_tokens
            self.handle(
                SequenceArrived(
                    request_id=name,
                    epoch=Epoch(0),
                    num_tokens=num_tokens,
                    max_total_tokens=num_tokens + more,
                    priority=int(priority),
                )
            )

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), num_steps=st.integers(1, 3))
    def work(self, data: st.DataObject, num_steps: int) -> None:
        """One sequence goes on, possibly from instance to instance."""
        _, name = data.draw(st.sampled_from(sorted(self.jobs)))
        for _ in range(num_steps):
            for instance in [holder for holder, job_name in self.jobs if job_name == name]:
                if (instance, name) in self.jobs:  # it may have been sent away
                    self.work_once(instance, name)

    def work_once(self, instance: InstanceId, name: RequestId) -> None:
        job = self.jobs[instance, name]
        if job == "early":
            return  # what it reads, nobody hears of
        identity = {"request_id": name, "epoch": self.epochs[name], "instance": instance}
        if job == "offering":
            del self.jobs[instance, name]
            self.leases.add((instance, name))
            self.handle(OfferMade(**identity))
        elif job == "pull":
            self.jobs[instance, name] = "decode"
            self.handle(PullEnded(**identity))
        else:
            if job in ("prefill", "migrate"):
                self.jobs[instance, name] = "offering"
            self.step(instance, name, 1, finished=False)

    @precondition(lambda self: "prefill" in self.jobs.values())
    @rule(data=st.data(), is_first=st.booleans())
    def offer_a_part(self, data: st.DataObject, is_first: bool) -> None:
        """Some blocks of a prompt are final; a part that comes twice, or out of turn, does no harm."""
        prefilling = sorted(key for key, job in self.jobs.items() if job == "prefill")
        instance, name = data.draw(st.sampled_from(prefilling))
        is_read = any(job == "early" and of == name for (_, of), job in self.jobs.items())
        self.handle(
            PartMade(request_id=name, epoch=self.epochs[name], instance=instance, is_first=is_first and not is_read)
        )

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), num_tokens=st.integers(0, 3))
    def finish(self, data: st.DataObject, num_tokens: int) -> None:
        candidates = sorted(key for key, job in self.jobs.items() if job not in ("offering", "early"))
        if candidates:
            instance, name = data.draw(st.sampled_from(candidates))
            del self.jobs[instance, name]
            self.step(instance, name, num_tokens, finished=True)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), kind=st.sampled_from(FailureKind))
    def give_back(self, data: st.DataObject, kind: FailureKind) -> None:
        holders = sorted(key for key, job in self.jobs.items() if job != "early")
        instance, name = data.draw(st.sampled_from(holders))
        del self.jobs[instance, name]
        self.handle(
            SequenceFailed(request_id=name, epoch=self.epochs[name], instance=instance, kind=kind, detail="fault")
        )

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """The client goes away; it may be late."""
        name = RequestId(f"s{data.draw(st.integers(1, self.names))}")
        self.handle(SequenceCancelled(request_id=name, epoch=Epoch(0)))

    @precondition(lambda self: self.names and self.live)
    @rule(data=st.data(), epoch=st.integers(0, 3))
    def say_something_out_of_date(self, data: st.DataObject, epoch: int) -> None:
        """A message overtaken by an abort, or about an attempt that is not the current one."""
        name = RequestId(f"s{data.draw(st.integers(1, self.names))}")
        instance = data.draw(st.sampled_from(sorted(self.live)))
        if epoch == self.epochs[name] and (instance, name) in self.jobs:
            return
        before = self.dispatcher.num_sequences
        identity = {"request_id": name, "epoch": Epoch(epoch), "instance": instance}
        self.handle(TokensEmitted(instance=instance, progress=(Progress(name, Epoch(epoch), 1, True),)))
        self.handle(PullEnded(**identity))
        if (instance, name) not in self.leases:
            self.leases.add((instance, name))
            self.handle(OfferMade(**identity))
            assert (instance, name) not in self.leases, "nobody will read those blocks"
        assert self.dispatcher.num_sequences == before

    @precondition(lambda self: self.live)
    @rule(data=st.data(), returning=st.booleans())
    def die(self, data: st.DataObject, returning: bool) -> None:
        instance = data.draw(st.sampled_from(sorted(self.live)))
        self.live.remove(instance)
        self.jobs = {key: job for key, job in self.jobs.items() if key[0] != instance}
        self.leases = {key for key in self.leases if key[0] != instance}
        self.visited = {attempt for attempt in self.visited if attempt[2] != instance}  # its next life knows of none
        self.handle(InstanceDown(instance=instance, returning=returning, detail="killed"))

    @precondition(lambda self: len(self.live) < len(self.instances))
    @rule(data=st.data(), back=st.booleans(), capacity=st.sampled_from([50, 100]))
    def return_or_be_given_up(self, data: st.DataObject, back: bool, capacity: int) -> None:
        instance = data.draw(st.sampled_from(sorted(set(self.instances) - self.live)))
        if back:
            self.handle(InstanceUp(instance=instance, max_total_tokens=capacity))
        else:
            self.handle(InstanceDown(instance=instance, returning=False, detail="given up"))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drain_or_undrain(self, data: st.DataObject) -> None:
        instance = data.draw(st.sampled_from(sorted(self.live)))
        if self.entry(instance).state is InstanceState.READY:
            self.handle(Drain(instance=instance))
        else:
            self.handle(Undrain(instance=instance))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), role=st.sampled_from(Role))
    def flip(self, data: st.DataObject, role: Role) -> None:
        instance = data.draw(st.sampled_from(sorted(self.live)))
        self.instances[instance] = role
        self.handle(ChangeRole(instance=instance, role=role))

    @precondition(lambda self: self.open)
    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0, 11.0, 51.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.handle(Tick())

    # What must hold -------------------------------------------------------------------------------------------

    @invariant()
    def dispatcher_knows_exactly_the_open_sequences(self) -> None:
        if hasattr(self, "dispatcher"):
            assert self.dispatcher.num_sequences == len(self.open) <= LIMITS.max_queued_requests

    @invariant()
    def nobody_works_for_a_sequence_that_ended(self) -> None:
        assert {name for _, name in self.jobs} <= self.open
        assert {name for _, name in self.leases} <= self.open

    def teardown(self) -> None:
        """Whatever is left ends at its deadline, and then no load is left."""
        if not hasattr(self, "dispatcher"):
            return
        self.now += 1000.0
        self.handle(Tick())
        assert not self.open
        assert all((entry.prefill_tokens, entry.kv_tokens) == (0, 0) for entry in self.dispatcher.instances)


TestDispatchMachine = DispatchMachine.TestCase
TestDispatchMachine.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)
