"""Which attempt of which sequence ended here lately, so that a late or repeated message cannot revive it."""

from typing import Final

from disagg.base.ids import Epoch, RequestId

CAPACITY: Final = 8192
"""Sequences remembered; a message cannot be late by more endings than this."""


class EpochMemory:
    """The newest ended epoch of at least the last ``CAPACITY`` sequences, and of twice as many at most.

    In two generations: a dictionary that only grows, and then takes the place of the older one, costs least.
    """

    def __init__(self) -> None:
        self._young: dict[RequestId, Epoch] = {}
        self._old: dict[RequestId, Epoch] = {}

    def remember(self, request_id: RequestId, epoch: Epoch) -> None:
        """Note that an attempt ended."""
        self._young[request_id] = epoch
        if len(self._young) >= CAPACITY:
            self._old, self._young = self._young, {}

    def has_ended(self, request_id: RequestId, epoch: Epoch) -> bool:
        """True when this attempt, or a later one, is known to have ended."""
        ended = self._young.get(request_id)
        if ended is None:
            ended = self._old.get(request_id)
        return ended is not None and ended >= epoch
