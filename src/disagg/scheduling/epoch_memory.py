"""Which attempt of which sequence ended here lately, so that a late or repeated message cannot revive it."""

from collections import OrderedDict
from typing import Final

from disagg.base.ids import Epoch, RequestId

CAPACITY: Final = 8192
"""Sequences remembered; a message cannot be late by more endings than this."""


class EpochMemory:
    """The newest ended epoch of each of the last ``CAPACITY`` sequences."""

    def __init__(self) -> None:
        self._ended: OrderedDict[RequestId, Epoch] = OrderedDict()

    def remember(self, request_id: RequestId, epoch: Epoch) -> None:
        """Note that an attempt ended."""
        self._ended[request_id] = epoch
        self._ended.move_to_end(request_id)
        if len(self._ended) > CAPACITY:
            self._ended.popitem(last=False)

    def has_ended(self, request_id: RequestId, epoch: Epoch) -> bool:
        """True when this attempt, or a later one, is known to have ended."""
        ended = self._ended.get(request_id)
        return ended is not None and ended >= epoch
