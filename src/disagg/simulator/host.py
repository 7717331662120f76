"""One host in virtual time: tells instances when their neighbours begin to make their steps longer or shorter."""

import math
from collections.abc import Callable, Iterable, Mapping

from disagg.base.ids import InstanceId
from disagg.costs.contention import Activity, HostContention, Interference, ServingCost
from disagg.costs.latency import LatencyModel
from disagg.simulator.core_loans import CoreLoans
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.instance_spec import LendingCores


class SimulatedHost:
    """``HostContention`` and ``CoreLoans`` on a virtual clock."""

    def __init__(
        self, queue: EventQueue, interference: Interference | None = None, serving: ServingCost | None = None
    ) -> None:
        self._queue = queue
        self.is_shared = interference is not None or serving is not None
        """Whether what one computes means anything to another."""
        self._contention = HostContention(interference, serving)
        self._loans = CoreLoans()
        self._on_change: dict[InstanceId, Callable[[], None]] = {}
        self._on_pace: dict[InstanceId, Callable[[], None]] = {}

    def join(self, instance: InstanceId, on_change: Callable[[], None], num_threads: int = 1) -> None:
        """Add an instance, which computes on so many cores.

        ``on_change`` is called when its steps from now on take longer or less time than before.
        """
        self._contention.join(instance, num_threads)
        self._on_change[instance] = on_change

    def lend_among(self, instance: InstanceId, cores: LendingCores, on_pace: Callable[[], None]) -> None:
        """Let an instance lend its cores and borrow others.

        ``on_pace`` is called when the step that it has goes on with more or fewer cores.
        """
        self._loans.join(instance, cores.own, cores.others)
        self._on_pace[instance] = on_pace

    def begin_step(
        self, instance: InstanceId, most: int, paces: Mapping[int, LatencyModel]
    ) -> Mapping[int, LatencyModel]:
        """Begin a step, which may borrow so many cores; return ``paces`` as they are beside what computes now.

        Neighbours that had its own cores are told, and those that compute on cores that it would take.
        """
        changed = self._loans.begin(instance, most)
        self._contention.set_borrowed(instance, self._loans.num_borrowed(instance))
        self._change_paces(changed)
        self._tell(self._loans.rivals(instance))
        return self._contention.latencies(instance, paces, self._queue.now())

    def end_step(self, instance: InstanceId) -> None:
        """End a step: it gives back what it borrowed."""
        self._change_paces(self._loans.end(instance))

    def lend(self, instance: InstanceId) -> None:
        """Lend the cores of an instance without a step."""
        self._change_paces(self._loans.lend(instance))

    def num_borrowed(self, instance: InstanceId) -> int:
        """Return on how many cores of others an instance's step is computed now."""
        return self._loans.num_borrowed(instance)

    def is_waited_for(self, instance: InstanceId) -> bool:
        """Return whether another takes a core that an instance borrowed as soon as its step ends."""
        return self._loans.is_waited_for(instance)

    def set_activity(
        self, instance: InstanceId, activity: Activity | None, num_tokens: int = 0, step_s: float = math.inf
    ) -> None:
        """See ``HostContention.set_activity``; the neighbours are told."""
        if not self.is_shared:
            return
        now = self._queue.now()
        was_due_s = self._contention.spread_at_s(instance)
        changed = self._contention.set_activity(instance, activity, now, num_tokens, step_s)
        due_s = self._contention.spread_at_s(instance)
        if due_s is not None and due_s != was_due_s:
            self._queue.push(due_s, self._tell_everyone)
        self._tell(changed)

    def arrive(self, prompt_len: int) -> None:
        """See ``HostContention.arrive``; who pays is told."""
        self._tell(self._contention.arrive(prompt_len, self._queue.now()))

    def latency_now(self, instance: InstanceId, alone: LatencyModel) -> LatencyModel:
        """See ``HostContention.latency``."""
        if not self.is_shared:
            return alone
        return self._contention.latency(instance, alone, self._queue.now())

    def _change_paces(self, instances: Iterable[InstanceId]) -> None:
        for instance in instances:
            self._contention.set_borrowed(instance, self._loans.num_borrowed(instance))
            self._on_pace[instance]()

    def _tell(self, instances: Iterable[InstanceId]) -> None:
        for instance in instances:
            self._on_change[instance]()

    def _tell_everyone(self) -> None:
        self._tell(self._on_change)
