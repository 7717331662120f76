"""What every link can do: start reading blocks of a peer's pool into the own one, and tell when that has ended."""

import enum
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from disagg.base.clock import Clock
from disagg.base.errors import HungError, TransferError
from disagg.cache.layout import KvLayout
from disagg.costs.links import KvCodec, LinkKind
from disagg.transfer.digests import split_digests
from disagg.transfer.source_blocks import BlockPair, SourceBlock, by_source

logger = logging.getLogger(__name__)


class CancelledTransferError(Exception):
    """Nobody wants a transfer any more."""


@dataclass(frozen=True, slots=True)
class KvRead:
    """What is to be read: ``layers`` of the first blocks of ``blocks``, into the second ones.

    Where blocks of the two pools are of unequal size, ``parts`` says of each pair which part of the larger block the
    smaller one is. ``digests`` are those of the peer's blocks (``sources``), one after the other, or empty to check
    nothing; they need all layers.
    ``access`` is the capability that came with the offer, for links on which it is asked for. With ``behind_step`` the
    peer's step of that number is still writing the blocks: each layer is read as soon as it is there. Their digests are
    not known then; those of what came are the transfer's, where ``wants_digests``.
    """

    blocks: Sequence[BlockPair]
    layers: range
    digests: bytes = b""
    access: bytes = b""
    timeout_s: float = 120.0
    behind_step: int = 0
    wants_digests: bool = False
    parts: Sequence[int] = ()

    @property
    def sources(self) -> list[SourceBlock]:
        """The peer's blocks that are read, each once, and where they go."""
        return by_source(self.blocks, self.parts)

    def num_bytes(self, remote: KvLayout, local: KvLayout) -> int:
        """Return how many bytes of the local pool are written."""
        count = min(remote.block_size, local.block_size)
        return len(self.blocks) * len(self.layers) * local.layer_block_bytes * count // local.block_size


class TransferState(enum.Enum):
    """What became of a transfer. All but ``RUNNING`` and ``HUNG`` are final."""

    RUNNING = "running"
    HUNG = "hung"
    """Given up, and bytes may still arrive: the target blocks may not be used. When none can any more, it is FAILED."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Transfer:
    """One read that was started. Its fields may be read from any thread.

    ``on_end(transfer)`` is called once, on the link's thread, when the state is final *and* it is certain that no byte
    will be written any more: until then the target blocks may not be used for anything. Of a transfer that hangs it is
    called before that too, with ``HUNG``.
    """

    def __init__(self, num_bytes: int, clock: Clock, on_end: Callable[["Transfer"], None]) -> None:
        self.num_bytes = num_bytes
        """Of the blocks in the pool."""
        self.num_repeated = 0
        """Blocks that were read again because they came with another digest."""
        self.digests = b""
        """Of the blocks as they came, where they were read behind a step."""
        self.codec = KvCodec.RAW
        self.failure = ""
        self.state = TransferState.RUNNING
        self.has_hung = False
        self.started_s = clock.now()
        self.ended_s = 0.0
        self._clock = clock
        self._on_end = on_end
        self._cancelled = threading.Event()

    def describe(self, kind: LinkKind) -> str:
        """Return what carried the blocks, and in which form where that is not their own."""
        return kind.value if self.codec is KvCodec.RAW else f"{kind.value} {self.codec.value}"

    @property
    def is_cancelled(self) -> bool:
        """True when the link should stop as soon as it can."""
        return self._cancelled.is_set()

    def check(self, until_s: float) -> None:
        """For the link: raise CancelledTransferError or TransferError when it should stop."""
        if self.is_cancelled:
            raise CancelledTransferError("the transfer was cancelled")
        if self._clock.now() >= until_s:
            raise TransferError("the transfer took longer than the lease of its blocks")

    def cancel(self) -> None:
        """Ask the link to stop. A transfer that is nearly over may still end as DONE."""
        self._cancelled.set()

    def run(self, copy: Callable[[], TransferState]) -> None:
        """For the link, on its thread: copy, then report how that ended.

        ``copy`` may raise TransferError and CancelledTransferError.
        """
        state, failure = TransferState.FAILED, ""
        try:
            state = copy()
        except CancelledTransferError:
            state = TransferState.CANCELLED
        except HungError as error:
            state, failure, self.has_hung = TransferState.HUNG, str(error), True
        except TransferError as error:
            failure = str(error)
        except Exception as error:  # a fault of ours must end the transfer too: somebody waits for it
            logger.exception("KV transfer failed")
            failure = f"{type(error).__name__}: {error}"
        self.ended_s = self._clock.now()
        self.failure = failure
        self.state = state
        self._on_end(self)

    def settle(self) -> None:
        """For the link: a transfer that hung writes nothing any more."""
        self.state = TransferState.FAILED
        self._on_end(self)


class Link(Protocol):
    """A way to one peer's pool. Methods do not block."""

    kind: LinkKind

    def read(self, read: KvRead, on_end: Callable[[Transfer], None]) -> Transfer:
        """Start copying blocks of the peer into the own pool. A block that comes with another digest is read again.

        Raises TransferError at once, and copies nothing, when a block or layer does not exist, or when the link cannot
        read behind a step.
        """

    def probe(self, target: memoryview, access: bytes) -> None:
        """Fill this memory with bytes of the peer that mean nothing, to see how long it takes. It blocks.

        ``access`` is the capability that the peer gives for this. Raises TransferError when they do not come.
        """

    def close(self) -> None:
        """Let go of the peer. Transfers that were started still end, and say so."""


def check_read(read: KvRead, remote: KvLayout, local: KvLayout) -> Sequence[bytes]:
    """Return each block's digest, or none; raise TransferError when a copy would reach outside one of the pools."""
    layers = read.layers
    if layers.step != 1 or not 0 <= layers.start <= layers.stop <= local.num_layers:
        raise TransferError(f"layers {layers} are not within the {local.num_layers} of the KV pool")
    for source, target in read.blocks:
        if not 0 <= source < remote.num_blocks:
            raise TransferError(f"the peer has no KV block {source}: its pool has {remote.num_blocks}")
        if not 0 <= target < local.num_blocks:
            raise TransferError(f"there is no KV block {target} here: the pool has {local.num_blocks}")
    num_parts = max(remote.block_size, local.block_size) // min(remote.block_size, local.block_size)
    if len(read.parts) != (len(read.blocks) if num_parts > 1 else 0) or any(
        not 0 <= part < num_parts for part in read.parts
    ):
        raise TransferError(f"{len(read.blocks)} pieces of {num_parts} in a block cannot be the parts {read.parts}")
    if read.digests and read.behind_step:
        raise TransferError(f"the blocks of step {read.behind_step}, which is running, cannot have digests yet")
    if read.digests and len(layers) != local.num_layers:
        raise TransferError(f"a digest is over all {local.num_layers} layers of a block, not over {len(layers)}")
    return split_digests(read.digests, len(read.sources))
