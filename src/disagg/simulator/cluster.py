"""A whole deployment in virtual time: arrivals in, ended requests out."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import Final

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError, InternalError
from disagg.base.ids import InstanceId
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.coded_links import CodedLinks
from disagg.costs.contention import Interference, ServingCost
from disagg.costs.links import SerialLinks
from disagg.costs.topology import DeviceRef, Place, Routes, Topology
from disagg.scheduling.replan.question import PlanAnswer, PlanQuestion
from disagg.scheduling.router.outputs import PlanDecided, ScalingDecided
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.faults import Faults
from disagg.simulator.host import SimulatedHost
from disagg.simulator.instance import SimulatedInstance
from disagg.simulator.instance_spec import InstanceSpec
from disagg.simulator.recording import Recording
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.router import SimulatedRouter, SlowPlanner
from disagg.simulator.step_ends import StepEnds

_MOST_NEW_OBJECTS: Final = 100_000
"""Objects that come to be, less those that go, between two searches for cycles while a simulation runs."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What a simulated deployment is made from.

    ``accept_s`` passes from a request's arrival to its dispatch (HTTP, tokenising), ``message_s`` on each message
    between router and instance, ``deliver_s`` from a token at an instance to the same token at the client.
    """

    instances: tuple[InstanceSpec, ...]
    spares: tuple[InstanceSpec, ...] = ()
    """Instances that are not there until a command, or autoscaling, lets them join."""
    start_spare_s: float = 1.0
    """From when autoscaling adds one to when it takes requests."""
    router: RouterSettings = field(default_factory=RouterSettings)
    topology: Topology = field(default_factory=Topology.one_node)
    """The router and what serves are on its first node."""
    kv_transfer_dtype: KvTransferDtype = KvTransferDtype.RAW
    """In which form KV blocks travel over networks."""
    accept_s: float = 0.0
    message_s: float = 0.0
    deliver_s: float = 0.0
    interference: Interference | None = None
    """What computing instances cost their neighbours on the same node; None: nothing."""
    serving: ServingCost | None = None
    """What serving takes of the cores of the router's node on which instances compute; None: nothing."""
    faults: Faults = field(default_factory=Faults)
    """What goes wrong."""

    planner: Callable[[PlanQuestion], PlanAnswer] | None = None
    """Answers the router's questions for a plan, ``plan_s`` later."""
    plan_s: float = 10.0

    @property
    def may_change(self) -> bool:
        """True when instances may come, go, or give their answers away."""
        return bool(self.faults.deaths or self.faults.commands) or self.router.changes_placement

    def places(self) -> dict[InstanceId, Place]:
        """Return where each instance is: where none has a place, all have devices of their own on the first node.

        Raises ConfigurationError when some have a place and others none, when two are on the same device, or one on
        none that there is.
        """
        everybody = (*self.instances, *self.spares)
        without = [instance.name for instance in everybody if not instance.place]
        if without and len(without) < len(everybody):
            raise ConfigurationError(f"{', '.join(without)} has no place, others have: give each one, or none")
        self.topology.check_places([instance.place for instance in everybody])
        if not without:
            return {instance.name: instance.place for instance in everybody}
        devices = (DeviceRef(self.topology.nodes[0].name, index) for index in count())
        return {instance.name: tuple(islice(devices, instance.num_devices)) for instance in everybody}


class SimulatedCluster:
    """Router and instances on one virtual clock.

    ``recording`` says who is told what happens.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        on_ended: Callable[[SimulatedRequest], None],
        recording: Recording | None = None,
    ) -> None:
        recording = recording or Recording()
        self.queue = EventQueue()
        self._spec = spec
        self._router = SimulatedRouter(
            spec.router,
            self.queue,
            on_ended,
            message_s=spec.message_s,
            log=recording.log,
            instances_may_die=spec.may_change,
            start_spare_s=spec.start_spare_s,
            planner=None if spec.planner is None else SlowPlanner(spec.planner, spec.plan_s),
        )
        places = spec.places()
        links: SerialLinks | CodedLinks
        links = SerialLinks(Routes(spec.topology, places).between)
        if spec.kv_transfer_dtype is not KvTransferDtype.RAW:
            links = CodedLinks(links, spec.kv_transfer_dtype)
        hosts = {node.name: SimulatedHost(self.queue, spec.interference) for node in spec.topology.nodes}
        first = spec.topology.nodes[0].name
        self._router_host = hosts[first] = SimulatedHost(self.queue, spec.interference, spec.serving)
        step_ends = StepEnds()
        self.instances = tuple(
            SimulatedInstance(
                instance,
                self.queue,
                links,
                self._router.hear,
                host=hosts[places[instance.name][0].node],
                step_ends=step_ends,
                faults=spec.faults,
                recording=recording,
            )
            for instance in (*spec.instances, *spec.spares)
        )
        num_present = len(spec.instances)
        self._router.connect(self.instances[:num_present], self.instances[num_present:])
        for timed in spec.faults.commands:
            self.queue.push(timed.time_s, partial(self._router.command, timed))
        for death in spec.faults.deaths:
            self.queue.push(death.time_s, partial(self._router.kill, death))

    @property
    def decisions(self) -> list[tuple[float, ScalingDecided | PlanDecided]]:
        """What the deployment decided of itself, and when."""
        return self._router.decisions

    def run(self, requests: Iterable[SimulatedRequest]) -> None:
        """Serve requests, given in order of arrival, until the last one has ended.

        Raise InternalError when one never ends or blocks do not come back: a fault of a policy.
        """
        self._expect(iter(requests))
        with _rare_collections():
            self.queue.run()
        if self._router.num_requests:
            raise InternalError(f"{self._router.num_requests} requests never ended and nothing is left to happen")
        for instance in self.instances:
            if not instance.is_alive:
                continue
            instance.validate()
            audit = instance.audit()
            if audit.free + audit.cached != audit.total:
                raise InternalError(f"blocks of {instance.spec.name} did not come back: {audit}")

    def submit_later(self, request: SimulatedRequest) -> None:
        """Take, while running, a request that arrives now or later: one that follows from another's end."""
        self.queue.push(request.arrival_s + self._spec.accept_s, partial(self._submit, request))

    def _expect(self, requests: Iterator[SimulatedRequest]) -> None:
        """Plan the next arrival: only one is known at a time, so that a long trace needs no memory."""
        request = next(requests, None)
        if request is None:
            return
        due_s = request.arrival_s + self._spec.accept_s
        if due_s < self.queue.now():
            raise ConfigurationError(
                f"request {request.request_id} arrives at {request.arrival_s} s, before the one before it: "
                "sort the workload by arrival"
            )
        self.queue.push(due_s, partial(self._arrive, request, requests))

    def _arrive(self, request: SimulatedRequest, requests: Iterator[SimulatedRequest]) -> None:
        self._expect(requests)
        self._submit(request)

    def _submit(self, request: SimulatedRequest) -> None:
        request.deliver_s = self._spec.deliver_s
        self._router_host.arrive(request.prompt_len)
        self._router.submit(request)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let cycles be collected rarely: a run makes hardly any, and a search goes through all that is simulated."""
    before = gc.get_threshold()
    gc.set_threshold(_MOST_NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
