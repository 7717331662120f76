"""What a step scheduler wants done. The shell (live engine or simulator) carries actions out in order."""

import enum

import msgspec

from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import Medium
from disagg.base.sampling import FinishReason


class Action(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all actions: the tag is the class name."""


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step: compute tokens ``[start, start + num_tokens)``.

    ``block_ids`` are all its blocks in order, covering at least the end of the chunk. ``samples`` when the chunk
    reaches the last known token, so that the next one is sampled. ``window_ids`` are those of layers with a sliding
    window, a run of them for each block from ``first_in_window`` on.
    """

    request_id: RequestId
    start: int
    num_tokens: int
    block_ids: tuple[BlockId, ...]
    samples: bool
    window_ids: tuple[BlockId, ...] = ()
    first_in_window: int = 0


class RunStep(Action, frozen=True, kw_only=True):
    """Run the model over these chunks, then report StepDone."""

    step_id: int
    chunks: tuple[Chunk, ...]
    num_borrowed: int = 0
    """Cores of other instances that the step may use while those have none."""
    num_standing: int = 0
    """Sequences of the step before that have one token more, each, and no chunk here: only a shell that lets a core
    ``repeat`` a step is given any."""

    @property
    def num_tokens(self) -> int:
        """New tokens over all chunks."""
        return sum(chunk.num_tokens for chunk in self.chunks)


class Emit(Action, frozen=True, kw_only=True):
    """Deliver the tokens that the step just ended sampled for these sequences."""

    request_ids: tuple[RequestId, ...]


class OfferKv(Action, frozen=True, kw_only=True):
    """Tell the world that ``num_tokens`` tokens of a sequence wait in ``block_ids``, for ``lease_s`` from now."""

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    block_ids: tuple[BlockId, ...]
    lease_s: float


class OfferPart(Action, frozen=True, kw_only=True):
    """Tell the world that these blocks of a sequence, from its ``first_block`` on, can be read; others are to come.

    They are final, or the step ``behind_step`` has just begun to write the last of them, layer after layer.
    """

    request_id: RequestId
    epoch: Epoch
    first_block: int
    num_tokens: int
    """Up to the end of the last of them."""
    block_ids: tuple[BlockId, ...]
    lease_s: float
    behind_step: int = 0


class LendKv(Action, frozen=True, kw_only=True):
    """Tell the world that the first ``num_tokens`` tokens of another's sequence wait in ``block_ids``; 0: none does."""

    request_id: RequestId
    epoch: Epoch
    num_tokens: int
    block_ids: tuple[BlockId, ...]
    lease_s: float


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """One block to copy: all that is in ``source`` into ``target``.

    Where the blocks of the two pools are of unequal size, all of the smaller one, which is this ``part`` of the larger.
    """

    source: BlockId
    target: BlockId
    part: int = 0


class Pull(Action, frozen=True, kw_only=True):
    """Copy blocks of ``source`` into this instance's pool, then report TransferDone or TransferFailed."""

    request_id: RequestId
    epoch: Epoch
    source: InstanceId
    copies: tuple[BlockCopy, ...]
    expires_s: float
    part: int | None = None
    """The first block of the part that they were offered in; None: they were offered whole."""


class StopPull(Action, frozen=True, kw_only=True):
    """End a running pull soon: others need the room. TransferFailed comes as ever."""

    request_id: RequestId
    epoch: Epoch


class BlockLoad(msgspec.Struct, frozen=True, array_like=True):
    """One block to read from ``medium``: that of this name into ``target``."""

    name: BlockHash
    target: BlockId
    medium: Medium = Medium.DISK


class LoadBlocks(Action, frozen=True, kw_only=True):
    """Read blocks from tiers into this instance's pool, then report TransferDone or TransferFailed."""

    request_id: RequestId
    epoch: Epoch
    blocks: tuple[BlockLoad, ...]


class SaveBlock(Action, frozen=True, kw_only=True):
    """Write a block, which keeps its contents meanwhile, to a tier under this name; then report BlockSaved."""

    block: BlockId
    name: BlockHash
    medium: Medium = Medium.DISK


class DropSaved(Action, frozen=True, kw_only=True):
    """Remove the blocks of these names from a tier."""

    names: tuple[BlockHash, ...]
    medium: Medium = Medium.DISK


class ReleaseLease(Action, frozen=True, kw_only=True):
    """Tell ``source`` that its offered blocks of this sequence are no longer needed."""

    request_id: RequestId
    epoch: Epoch
    source: InstanceId


class RejectReason(enum.Enum):
    """Why a sequence cannot be served here at all."""

    TOO_LONG = "too_long"
    """It could grow past what the KV pool holds."""


class Reject(Action, frozen=True, kw_only=True):
    """The sequence was not taken."""

    request_id: RequestId
    epoch: Epoch
    reason: RejectReason
    detail: str


class Forget(Action, frozen=True, kw_only=True):
    """The sequence ended here (complete, cancelled or failed): drop its state."""

    request_id: RequestId
    epoch: Epoch
    reason: FinishReason


class WakeAt(Action, frozen=True, kw_only=True):
    """Send Tick at this time, if nothing else did before."""

    time_s: float


AnyMove = (
    OfferKv
    | OfferPart
    | LendKv
    | Pull
    | StopPull
    | LoadBlocks
    | SaveBlock
    | DropSaved
    | ReleaseLease
    | Reject
    | Forget
    | WakeAt
)
"""What is done once for a sequence or a block, beside its steps."""
AnyAction = RunStep | Emit | AnyMove
