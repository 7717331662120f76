"""What a simulated instance's loop spends on the digests of blocks that it offers, as a live one does between steps."""

from disagg.base.ids import BlockId, Epoch, RequestId
from disagg.base.messages import Offered, PartOffered
from disagg.scheduling.step.actions import Forget


class DigestWork:
    """Digests made in one life of an instance; one block's takes ``block_s``.

    A whole offer has those of the parts before it, and blocks that a step is still writing have none.
    """

    def __init__(self, block_s: float) -> None:
        self._block_s = block_s
        self._of_parts: dict[tuple[RequestId, Epoch], set[BlockId]] = {}

    def time_s(self, message: Offered | PartOffered) -> float:
        """Return the seconds that an offer costs the loop."""
        offer = message.offer
        if not self._block_s or offer.behind_step:
            return 0.0
        key = offer.request_id, offer.epoch
        new = set(offer.block_ids) - self._of_parts.get(key, set())
        if isinstance(message, PartOffered):
            self._of_parts.setdefault(key, set()).update(new)
        return len(new) * self._block_s

    def forget(self, forgotten: Forget) -> None:
        """Nothing more of an attempt will be offered."""
        self._of_parts.pop((forgotten.request_id, forgotten.epoch), None)
