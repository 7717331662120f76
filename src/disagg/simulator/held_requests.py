"""The requests that a simulated instance has: in which attempt they came last, and who else still computes them."""

from collections.abc import Iterable

from disagg.base.ids import Epoch, RequestId
from disagg.base.sampling import FinishReason
from disagg.scheduling.instance.inputs import Continue, Expect, Start
from disagg.scheduling.step.actions import Chunk, Forget
from disagg.scheduling.step.events import StepResult
from disagg.simulator.request import SimulatedRequest


class HeldRequests:
    """Those of one life of an instance. Full KV blocks of ``block_size`` tokens have names."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._by_id: dict[RequestId, SimulatedRequest] = {}
        self._attempts: dict[RequestId, Epoch] = {}
        self._expected: set[RequestId] = set()

    def __contains__(self, request: SimulatedRequest) -> bool:
        return request.request_id in self._by_id

    def __getitem__(self, request_id: RequestId) -> SimulatedRequest:
        return self._by_id[request_id]

    def take(self, request: SimulatedRequest, message: Start | Continue | Expect) -> None:
        """Take a request that starts here, goes on here, or will."""
        self._by_id[request.request_id] = request
        self._attempts[request.request_id] = message.sequence.epoch
        if type(message) is Expect:
            self._expected.add(request.request_id)
        else:
            self._expected.discard(request.request_id)

    def forget(self, output: Forget) -> None:
        """Let a request go, unless it has come again meanwhile."""
        request_id = output.request_id
        if self._attempts.get(request_id, output.epoch) <= output.epoch:
            self._by_id.pop(request_id, None)
            self._attempts.pop(request_id, None)
            self._expected.discard(request_id)

    def of(self, request_ids: Iterable[RequestId]) -> list[SimulatedRequest]:
        """Return the requests of these names."""
        by_id = self._by_id
        return [by_id[request_id] for request_id in request_ids]

    def unreported(self) -> list[SimulatedRequest]:
        """Return those with tokens from here, neither first nor last, that the router was not told of."""
        return [
            request
            for request in self._by_id.values()
            if 0 < request.num_reported_tokens < request.num_output_tokens
            and not request.is_complete
            and request.request_id not in self._expected
        ]

    def count_tokens(self, chunks: Iterable[Chunk]) -> list[StepResult]:
        """Count the tokens that a step has brought; return what there is to say of them."""
        results, by_id = [], self._by_id
        for chunk in chunks:
            if chunk.samples:
                request = by_id[chunk.request_id]
                request.num_output_tokens += 1
                finished = FinishReason.LENGTH if request.num_output_tokens >= request.output_len else None
                names = request.names_of_new(1, self._block_size) if request.block_hashes else ()
                if names or finished is not None:
                    results.append(StepResult(chunk.request_id, finished, names))
        return results
