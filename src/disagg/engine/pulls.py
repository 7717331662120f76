"""Pulls of KV blocks under way: started by the loop, copied by the transfer room, their ends collected by the loop."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from disagg.base.errors import ProtocolError, TransferError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.scheduling.step.actions import Pull
from disagg.transfer.link import Transfer, TransferState
from disagg.transfer.links import Links


@dataclass(frozen=True, slots=True)
class PullResult:
    """How one pull ended. Nothing is written to ``targets`` any more."""

    request_id: RequestId
    epoch: Epoch
    targets: tuple[BlockId, ...]
    state: TransferState
    failure: str
    num_bytes: int
    started_s: float
    ended_s: float


class Pulls:
    """The pulls of one instance. ``wake`` is called from the copying thread when one has ended."""

    def __init__(self, links: Links, num_layers: int, wake: Callable[[], None]) -> None:
        self._links = links
        self._layers = range(num_layers)
        self._wake = wake
        self._running: dict[tuple[RequestId, Epoch], Transfer] = {}
        self._ended: deque[PullResult] = deque()

    def start(self, pull: Pull, address: bytes, now: float) -> None:
        """Start copying from the pool at ``address``. A pull that cannot start has ended, failed."""
        blocks = [(copy.source, copy.target) for copy in pull.copies]
        on_end = partial(self._on_end, pull)
        try:
            transfer = self._links.open(address).read(blocks, self._layers, on_end)
        except (TransferError, ProtocolError) as error:
            self._ended.append(_result(pull, TransferState.FAILED, str(error), 0, (now, now)))
            self._wake()
        else:
            self._running[pull.request_id, pull.epoch] = transfer

    def cancel(self, request_id: RequestId, epoch: Epoch) -> None:
        """Stop a pull as soon as possible, if it runs; its end is reported like any other."""
        transfer = self._running.get((request_id, epoch))
        if transfer is not None:
            transfer.cancel()

    def take_ended(self) -> list[PullResult]:
        """Return the pulls that ended since the last call, in the order of their ends."""
        results = []
        while self._ended:
            result = self._ended.popleft()
            self._running.pop((result.request_id, result.epoch), None)
            results.append(result)
        return results

    def close_peer(self, incarnation: str) -> None:
        """Let go of an instance that died. What is already mapped is read to its end."""
        self._links.close_peer(incarnation)

    def close(self) -> None:
        """Cancel what runs, without waiting for its end, and let go of all peers."""
        for transfer in self._running.values():
            transfer.cancel()
        self._links.close()

    def _on_end(self, pull: Pull, transfer: Transfer) -> None:
        times = (transfer.started_s, transfer.ended_s)
        self._ended.append(_result(pull, transfer.state, transfer.failure, transfer.num_bytes, times))
        self._wake()


def _result(pull: Pull, state: TransferState, failure: str, num_bytes: int, times: tuple[float, float]) -> PullResult:
    return PullResult(
        request_id=pull.request_id,
        epoch=pull.epoch,
        targets=tuple(copy.target for copy in pull.copies),
        state=state,
        failure=failure,
        num_bytes=num_bytes if state is TransferState.DONE else 0,
        started_s=times[0],
        ended_s=times[1],
    )
