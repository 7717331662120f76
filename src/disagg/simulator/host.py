"""One host in virtual time: tells instances when their neighbours begin to make their steps longer or shorter."""

import math
from collections.abc import Callable, Iterable

from disagg.base.ids import InstanceId
from disagg.costs.contention import Activity, HostContention, Interference, ServingCost
from disagg.costs.latency import LatencyModel
from disagg.simulator.event_queue import EventQueue


class SimulatedHost:
    """``HostContention`` on a virtual clock."""

    def __init__(
        self, queue: EventQueue, interference: Interference | None = None, serving: ServingCost | None = None
    ) -> None:
        self._queue = queue
        self.is_shared = interference is not None or serving is not None
        """Whether what one computes means anything to another."""
        self._contention = HostContention(interference, serving)
        self._on_change: dict[InstanceId, Callable[[], None]] = {}

    def join(self, instance: InstanceId, on_change: Callable[[], None], num_threads: int = 1) -> None:
        """Add an instance, which computes on so many cores.

        ``on_change`` is called when its steps from now on take longer or less time than before.
        """
        self._contention.join(instance, num_threads)
        self._on_change[instance] = on_change

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

    def _tell(self, instances: Iterable[InstanceId]) -> None:
        for instance in instances:
            self._on_change[instance]()

    def _tell_everyone(self) -> None:
        self._tell(self._on_change)
