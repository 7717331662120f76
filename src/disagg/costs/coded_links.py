"""Transfers whose bytes may be coded on the way: fewer to carry, and time at both ends to code them."""

from dataclasses import dataclass

from disagg.base.ids import InstanceId
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.codec_choice import CodecChoice
from disagg.costs.links import KvCodec, LinkKind, SerialLinks


@dataclass(frozen=True)
class CodecCost:
    """What int8 costs and saves. The defaults are those of bfloat16 in blocks of 64 tokens with heads of 64.

    ``disagg bench transfer`` prints the speed; 2.3 GB/s were measured on a busy core with AVX-512 (2026-11-28).
    """

    bytes_share: float = 0.531
    """Coded bytes for each byte of the pool."""
    bytes_per_s: float = 2.3e9
    """Of the pool, coded at one end and then decoded at the other."""


class CodedLinks:
    """``SerialLinks`` on which blocks travel in the form that ``dtype`` says, chosen as a live reader chooses.

    Only where a network carries bytes (``LinkKind.TCP``) are they coded; other links are read as they are.
    """

    def __init__(self, links: SerialLinks, dtype: KvTransferDtype, cost: CodecCost | None = None) -> None:
        self._links = links
        self._dtype = dtype
        self._cost = cost or CodecCost()
        self._choices: dict[tuple[InstanceId, InstanceId], CodecChoice] = {}

    def kind(self, source: InstanceId, target: InstanceId) -> LinkKind:
        """Return what carries the bytes."""
        return self._links.kind(source, target)

    def speed(self, source: InstanceId, target: InstanceId) -> tuple[float, float]:
        """Return seconds to the first byte and bytes/s of blocks as they are, on a link that is free."""
        return self._links.speed(source, target)

    def start(self, source: InstanceId, target: InstanceId, num_bytes: int, now: float) -> float:
        """Queue a transfer of so many bytes of a pool at ``now`` and return when it ends."""
        if self._links.kind(source, target) is not LinkKind.TCP:
            return self._links.start(source, target, num_bytes, now)
        choice = self._choices.setdefault((source, target), CodecChoice())
        codec = choice.choose(num_bytes) if self._dtype is KvTransferDtype.AUTO else KvCodec(self._dtype.value)
        if codec is KvCodec.RAW:
            end_s = self._links.start(source, target, num_bytes, now)
        else:
            coded_bytes = int(num_bytes * self._cost.bytes_share)
            end_s = self._links.start(source, target, coded_bytes, now) + num_bytes / self._cost.bytes_per_s
        choice.observe(codec, num_bytes, end_s - now)
        return end_s
