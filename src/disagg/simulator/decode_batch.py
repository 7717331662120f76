"""The requests that an instance decodes in one step after the other: their tokens are counted for all of them together.

As in ``scheduling.step.standing_step``, a request is looked at when it comes and when it goes, not at every step.
"""

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence

from disagg.base.ids import BlockHash, RequestId
from disagg.base.messages import StageStamps
from disagg.base.sampling import FinishReason
from disagg.costs.latency import StepShape
from disagg.measure.statistics import LogHistogram
from disagg.scheduling.step.events import StepResult
from disagg.simulator.request import SimulatedRequest, add_tokens


class DecodeBatch:
    """The batch of one instance. ``gaps`` receives what lies between tokens, if anybody wants that."""

    def __init__(self, requests: Iterable[SimulatedRequest], block_size: int, gaps: LogHistogram | None) -> None:
        self._block_size = block_size
        self._gaps = gaps
        self._num_ends = 0
        self._last_s = math.nan
        """When the step ended last."""
        self._since: dict[SimulatedRequest, int] = {}
        """After how many ends the tokens of each were right last."""
        self._due: list[tuple[int, int, SimulatedRequest]] = []
        """After how many ends each is complete; those that have gone included."""
        self._num_come = 0
        self._fresh: list[SimulatedRequest] = []
        """Those without a token from here yet whose time was noted."""
        self._named: list[SimulatedRequest] = []
        self.is_told_in_sum = True
        """False where the sum of their tokens is not all that the router wants to know."""
        self._context = 0
        """Known tokens of all, and those that the router was not told of; less what all ends have brought each."""
        self._untold = 0
        self.join(requests)

    def __contains__(self, request: SimulatedRequest) -> bool:
        return request in self._since

    @property
    def shape(self) -> StepShape:
        """What the next step computes."""
        count = len(self._since)
        context = self._context + count * self._num_ends
        return StepShape(num_decodes=count, decode_context=context, num_samples=count)

    @property
    def num_repeats(self) -> int:
        """How often the next step can be repeated before one brings a first or a last token, which are news."""
        if self._fresh and not all(request.num_output_tokens for request in self._fresh):
            return 0
        return self._due[0][0] - self._num_ends - 1

    def num_untold_after(self, num_ends: int) -> int:
        """Return of how many tokens the router was not told once the step has ended so often again."""
        return self._untold + len(self._since) * (self._num_ends + num_ends)

    def join(self, requests: Iterable[SimulatedRequest]) -> None:
        """Let these take part from the next step on."""
        ends = self._num_ends
        for request in requests:
            self._since[request] = ends
            self._fresh.append(request)
            self._num_come += 1
            due = ends + request.output_len - request.num_output_tokens
            heapq.heappush(self._due, (due, self._num_come, request))
            self._context += request.num_tokens - ends
            self._untold += request.num_output_tokens - request.num_reported_tokens - ends
            if request.block_hashes:
                self._named.append(request)

    def count(self, num_ends: int) -> dict[RequestId, tuple[BlockHash, ...]]:
        """The step has ended so often, and nobody is complete; return the names of the blocks that are full by that."""
        self._num_ends += num_ends
        return self._names(num_ends) if self._named else {}

    def finish(self, now: float) -> list[StepResult]:
        """The step has ended once more; let those go that are complete by that, and return what there is to say."""
        names = self.count(1)
        self._note_old(now, now)
        results = {request_id: StepResult(request_id, None, its) for request_id, its in names.items() if its}
        while self._due and self._due[0][0] <= self._num_ends:
            request = heapq.heappop(self._due)[2]
            if request not in self._since:
                continue
            its_names = names.get(request.request_id, ())
            results[request.request_id] = StepResult(request.request_id, FinishReason.LENGTH, its_names)
            self._leave(request)
        return list(results.values())

    def note_times(self, count: int, ends_s: Sequence[float], stamps: Mapping[RequestId, StageStamps]) -> None:
        """The last ``count`` ends were at these times; ``stamps`` go with first tokens from here."""
        num_all = len(self._since)
        self._note_old(ends_s[0], ends_s[-1])
        self.note_fresh(count, ends_s[0], ends_s[-1], stamps)
        if self._gaps is not None and count > 1:
            self._gaps.add_between(ends_s, num_all)

    def note_fresh(self, count: int, first_s: float, last_s: float, stamps: Mapping[RequestId, StageStamps]) -> None:
        """Those that came have had their first ``count`` tokens here."""
        fresh, self._fresh = self._fresh, []
        for request in fresh:
            self._count_tokens(request)
        gaps_s = add_tokens(fresh, count, first_s, last_s, stamps)
        if self._gaps is not None:
            self._gaps.add_all(gaps_s)

    def settle(self) -> None:
        """Make the tokens and times of all right."""
        for request in self._since:
            self._settle(request)

    def _note_old(self, first_s: float, last_s: float) -> None:
        num_old = len(self._since) - len(self._fresh)
        if num_old and self._gaps is not None:
            self._gaps.add(first_s - self._last_s, num_old)
        self._last_s = last_s

    def _names(self, count: int) -> dict[RequestId, tuple[BlockHash, ...]]:
        for request in self._named:
            self._count_tokens(request)
        return {request.request_id: request.names_of_new(count, self._block_size) for request in self._named}

    def _leave(self, request: SimulatedRequest) -> None:
        self._settle(request)
        del self._since[request]
        self._context -= request.num_tokens - self._num_ends
        self._untold -= request.num_output_tokens - request.num_reported_tokens - self._num_ends
        if request.block_hashes:
            self._named.remove(request)

    def _settle(self, request: SimulatedRequest) -> None:
        self._count_tokens(request)
        if request not in self._fresh:
            request.timeline.last_token_s = self._last_s

    def _count_tokens(self, request: SimulatedRequest) -> None:
        since = self._since.get(request)
        if since is not None:
            request.num_output_tokens += self._num_ends - since
            self._since[request] = self._num_ends
