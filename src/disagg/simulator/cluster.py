"""A whole deployment in virtual time: arrivals in, ended requests out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from disagg.base.config import RouterSettings
from disagg.base.errors import ConfigurationError, InternalError
from disagg.costs.contention import Interference, ServingCost
from disagg.costs.links import LinkModel, Route, SerialLinks
from disagg.measure.statistics import LogHistogram
from disagg.simulator.event_log import EventLog
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.host import SimulatedHost
from disagg.simulator.instance import InstanceSpec, SimulatedInstance
from disagg.simulator.request import SimulatedRequest
from disagg.simulator.router import SimulatedRouter
from disagg.simulator.timeline_page import TimelineRecorder


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What a simulated deployment is made from.

    ``accept_s`` passes from a request's arrival to its dispatch (HTTP, tokenising), ``message_s`` on each message
    between router and instance, ``deliver_s`` from a token at an instance to the same token at the client.
    """

    instances: tuple[InstanceSpec, ...]
    router: RouterSettings = field(default_factory=RouterSettings)
    link: LinkModel = field(default_factory=LinkModel)
    accept_s: float = 0.0
    message_s: float = 0.0
    deliver_s: float = 0.0
    interference: Interference | None = None
    """What computing instances cost their neighbours, all on one host; None: nothing."""
    serving: ServingCost | None = None
    """What serving takes of the cores on which instances compute; None: nothing."""


class SimulatedCluster:
    """Router and instances on one virtual clock.

    ``step_by_step`` asks the schedulers after every step, also where runs of equal decode steps can be timed ahead:
    slower, with equal results. So do a ``log``, which receives every decision, and a ``timeline``. ``gaps`` receives
    the inter-token latencies in seconds.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        on_ended: Callable[[SimulatedRequest], None],
        *,
        step_by_step: bool = False,
        log: EventLog | None = None,
        timeline: TimelineRecorder | None = None,
        gaps: LogHistogram | None = None,
    ) -> None:
        self.queue = EventQueue()
        self._spec = spec
        roles = {instance.name: instance.role for instance in spec.instances}
        self._router = SimulatedRouter(
            spec.router,
            self.queue,
            on_ended,
            message_s=spec.message_s,
            recorder=log.dispatcher(roles, spec.router) if log else None,
        )
        num_devices = {instance.name: instance.num_devices for instance in spec.instances}
        links = SerialLinks(lambda a, b: Route.over(spec.link, min(num_devices[a], num_devices[b])))
        self._host = SimulatedHost(self.queue, spec.interference, spec.serving)
        self.instances = tuple(
            SimulatedInstance(
                instance,
                self.queue,
                links,
                self._router,
                log.scheduler(instance.name, instance.log_header()) if log else None,
                timeline=timeline,
                gaps=gaps,
                host=self._host,
                step_by_step=step_by_step,
            )
            for instance in spec.instances
        )
        self._router.connect(self.instances)

    def run(self, requests: Iterable[SimulatedRequest]) -> None:
        """Serve requests, given in order of arrival, until the last one has ended.

        Raise InternalError when one never ends or blocks do not come back: a fault of a policy.
        """
        self._expect(iter(requests))
        self.queue.run()
        if self._router.num_requests:
            raise InternalError(f"{self._router.num_requests} requests never ended and nothing is left to happen")
        for instance in self.instances:
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
        self._host.arrive(request.prompt_len)
        self._router.submit(request)
