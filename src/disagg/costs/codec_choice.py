"""In which form KV blocks travel over one link, chosen by what transfers in each form took there."""

from collections import deque
from typing import Final

from disagg.costs.links import KvCodec, LinkModel, fit_link

MIN_BYTES: Final = 1 << 20
"""Less than this is sent raw: what it takes is latency, and measuring it says nothing about bandwidth."""

_NUM_KEPT: Final = 16
_NUM_FIRST: Final = 2
"""Transfers of each form before they are compared."""
_REPEAT: Final = 64
"""Every so often the slower form is tried again: links change."""


class CodecChoice:
    """Deterministic. Times count from the request for blocks to the last one in the pool, coding included."""

    def __init__(self) -> None:
        self._taken: dict[KvCodec, deque[tuple[int, float]]] = {
            codec: deque(maxlen=_NUM_KEPT) for codec in (KvCodec.RAW, KvCodec.INT8)
        }
        self._num_choices = 0

    def choose(self, num_bytes: int) -> KvCodec:
        """Return the form in which so many bytes of the pool are predicted to be here first."""
        if num_bytes < MIN_BYTES:
            return KvCodec.RAW
        for codec, taken in self._taken.items():
            if len(taken) < _NUM_FIRST:
                return codec
        self._num_choices += 1
        in_order = sorted(self._taken, key=lambda codec: self._model(codec).transfer_time_s(num_bytes))
        return in_order[1 if self._num_choices % _REPEAT == 0 else 0]

    def observe(self, codec: KvCodec, num_bytes: int, time_s: float) -> None:
        """Remember how long a transfer of ``num_bytes`` of the pool took."""
        if num_bytes >= MIN_BYTES and time_s > 0:
            self._taken[codec].append((num_bytes, time_s))

    def _model(self, codec: KvCodec) -> LinkModel:
        return fit_link(list(self._taken[codec]))
