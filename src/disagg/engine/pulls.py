"""Pulls of KV blocks under way: started by the loop, copied by the transfer room, their ends collected by the loop."""

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from disagg.base.errors import ProtocolError, TransferError
from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.messages import KvOffer
from disagg.cache.layout import KvLayout
from disagg.costs.links import LinkKind
from disagg.scheduling.instance.inputs import CopyEnded, CopySettled
from disagg.scheduling.instance.outputs import StartCopy
from disagg.transfer.digests import split_digests
from disagg.transfer.link import KvRead, Transfer, TransferState
from disagg.transfer.links import Links, SharedBlocks
from disagg.transfer.source_blocks import by_source

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EndedPull:
    """A pull that ended. ``received`` are the blocks that it brought."""

    result: CopyEnded | CopySettled
    received: tuple[BlockId, ...] = ()


class Pulls:
    """The pulls of one instance. ``wake`` is called from the copying thread when one has ended.

    ``shared`` is what others may pull from it, ``layout`` that of its pool.
    """

    def __init__(self, links: Links, shared: SharedBlocks, layout: KvLayout, wake: Callable[[], None]) -> None:
        self._links = links
        self._shared = shared
        self._layout = layout
        self._wake = wake
        self._running: dict[tuple[RequestId, Epoch], Transfer] = {}
        self._ended: deque[EndedPull] = deque()

    def seal(self, offer: KvOffer, *, is_part: bool = False) -> KvOffer:
        """Return an offer of this instance with what its reader needs beside the block ids."""
        return self._shared.seal(offer, is_part=is_part)

    def forget(self, request_id: RequestId, epoch: Epoch) -> None:
        """Nothing more of an attempt will be offered."""
        self._shared.forget(request_id, epoch)

    def start(self, pull: StartCopy, now: float) -> None:
        """Start copying. A pull that cannot start has ended, failed."""
        try:
            link = self._links.open(pull.offer.pool, pull.source)
            read = _wanted(pull, self._layout, pull.expires_s - now, wants_digests=self._shared.has_digests)
            transfer = link.read(read, partial(self._on_end, pull, link.kind))
        except (TransferError, ProtocolError) as error:
            self._end(
                pull,
                CopyEnded(
                    request_id=pull.request_id,
                    epoch=pull.epoch,
                    num_bytes=0,
                    started_s=now,
                    ended_s=now,
                    failure=str(error),
                ),
            )
        else:
            self._running[pull.request_id, pull.epoch] = transfer

    def cancel(self, request_id: RequestId, epoch: Epoch) -> None:
        """Stop a pull as soon as possible, if it runs; its end is reported like any other."""
        transfer = self._running.get((request_id, epoch))
        if transfer is not None:
            transfer.cancel()

    def take_ended(self) -> list[EndedPull]:
        """Return the pulls that ended since the last call, in the order of their ends."""
        pulls = []
        while self._ended:
            ended = self._ended.popleft()
            if isinstance(ended.result, CopyEnded):
                self._running.pop((ended.result.request_id, ended.result.epoch), None)
            pulls.append(ended)
        return pulls

    def close_peer(self, incarnation: str) -> None:
        """Let go of an instance that died. What is already mapped is read to its end."""
        self._links.close_peer(incarnation)

    def close(self) -> None:
        """Cancel what runs, without waiting for its end, and let go of all peers."""
        for transfer in self._running.values():
            transfer.cancel()
        self._links.close()

    def _on_end(self, pull: StartCopy, kind: LinkKind, transfer: Transfer) -> None:
        if transfer.has_hung and transfer.state is TransferState.FAILED:
            self._end(pull, CopySettled(request_id=pull.request_id, epoch=pull.epoch))
            return
        link = transfer.describe(kind)
        is_done = transfer.state is TransferState.DONE
        if transfer.num_repeated:
            logger.error(
                "%d KV blocks of %s came from %s over %s with another digest than they were offered with",
                transfer.num_repeated,
                pull.request_id,
                pull.source,
                link,
            )
        result = CopyEnded(
            request_id=pull.request_id,
            epoch=pull.epoch,
            num_bytes=transfer.num_bytes if is_done else 0,
            started_s=transfer.started_s,
            ended_s=transfer.ended_s,
            failure="" if is_done else transfer.failure or f"the pull was {transfer.state.value}",
            link=link,
            num_repeated=transfer.num_repeated,
            may_still_write=transfer.state is TransferState.HUNG,
            digests=transfer.digests if pull.offer.behind_step else None,
        )
        self._end(pull, result)

    def _end(self, pull: StartCopy, result: CopyEnded | CopySettled) -> None:
        has_come = isinstance(result, CopyEnded) and not result.failure
        targets = dict.fromkeys(copy.target for copy in pull.copies)
        self._ended.append(EndedPull(result, tuple(targets) if has_come else ()))
        self._wake()


def _wanted(pull: StartCopy, layout: KvLayout, timeout_s: float, *, wants_digests: bool) -> KvRead:
    """Return what a pull reads; raise TransferError when the digests are not those of the offered blocks."""
    offer = pull.offer
    blocks = [(copy.source, copy.target) for copy in pull.copies]
    parts = [copy.part for copy in pull.copies] if offer.block_size != layout.block_size else []
    digests = b""
    if offer.digests:
        of_block = dict(zip(offer.block_ids, split_digests(offer.digests, len(offer.block_ids)), strict=True))
        digests = b"".join([of_block[block.block] for block in by_source(blocks, parts)])
    return KvRead(
        blocks,
        range(layout.num_layers),
        parts=parts,
        digests=digests,
        access=offer.access,
        timeout_s=timeout_s,
        behind_step=offer.behind_step,
        wants_digests=wants_digests and offer.behind_step > 0,
    )
