"""The control plane: what the router and the engine instances say to each other.

Messages are msgspec tagged structs in MessagePack, one message a ZeroMQ frame. They are decoded by schema and
refused when longer than ``MAX_MESSAGE_BYTES``, of another version, or with a value that cannot be. KV bytes never
travel here: an ``Offer`` says where they are, and the decode instance pulls them over a link of the transfer room.
What an instance says of itself is range-checked here. A request is checked by the instance that gets it, which can
answer what is wrong (``Failed``); a message that cannot be decoded gets no answer. Every message about a sequence
carries ``(request_id, epoch)``; a receiver ignores an epoch that is not current.
"""

import enum
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from disagg.base.errors import ProtocolError
from disagg.base.ids import BlockHash, BlockId, Epoch, InstanceId, RequestId
from disagg.base.kv_events import AnyKvEvent, EventNumber
from disagg.base.message_fields import (
    MAX_MESSAGE_BYTES,
    BytesPerSecond,
    Count,
    Message,
    Name,
    Positive,
    Seconds,
    TokenId,
    Words,
)
from disagg.base.request import GenerationRequest, Role
from disagg.base.router_messages import ForeignLoad, JoinRouter, LeaveRouter
from disagg.base.sampling import FinishReason, PositionLogprobs
from disagg.base.step_limits import StepLimits
from disagg.base.window_blocks import WindowBlocks

T = TypeVar("T")


class KvOffer(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """KV blocks that a prefill instance holds, leased, for whoever continues the sequence.

    ``num_tokens`` tokens are in ``block_ids``, ``block_size`` in each; behind those are the blocks of layers with a
    sliding window of all tokens that a later one sees, see ``WindowBlocks``. ``pool`` is the source's pool address as
    the transfer room encoded it. The blocks are kept for ``lease_s`` from when the offer is received. ``digests`` (8
    bytes for each block, or none), and ``access``, which opens them, are the transfer room's too. A part of a sequence
    begins with ``first_block``; with ``behind_step`` that step of the source is still writing it, layer after layer.
    The router that passes an offer on says how long ago the first token of the answer came, ``answer_age_s``, and how
    many tokens have come after it: whoever continues the sequence knows how far it is behind.
    """

    request_id: RequestId
    epoch: Annotated[Epoch, Meta(ge=0)]
    source: InstanceId
    incarnation: Name
    num_tokens: Positive
    block_size: Positive
    block_ids: tuple[Annotated[BlockId, Meta(ge=0, lt=2**31)], ...]
    lease_s: Seconds
    pool: bytes
    digests: bytes = b""
    access: bytes = b""
    first_block: Count = 0
    behind_step: Count = 0
    answer_age_s: Seconds = 0.0
    num_later_tokens: Count = 0


# Router to engine ---------------------------------------------------------------------------------------------


class Generate(Message, frozen=True, kw_only=True):
    """Compute this sequence. With ``hand_over``, stop after the first token and offer the KV blocks.

    Another instance lends the KV blocks of ``prefix``, its first tokens.
    """

    request: GenerationRequest
    hand_over: bool = False
    prefix: KvOffer | None = None


class Adopt(Message, frozen=True, kw_only=True):
    """Continue this sequence, whose KV blocks another instance offers."""

    request: GenerationRequest
    offer: KvOffer


class Reserve(Message, frozen=True, kw_only=True):
    """Another instance computes this sequence for you: make room, and read the first of its KV blocks already."""

    request: GenerationRequest
    offer: KvOffer


class MoreKv(Message, frozen=True, kw_only=True):
    """The next KV blocks of a sequence that there is room for are computed: read them already."""

    offer: KvOffer


class Lend(Message, frozen=True, kw_only=True):
    """Keep the cached KV blocks of these names, as far as they are there from the first on, for another instance that
    computes this sequence; answer with Offered, or with NotHeld where there is none.
    """

    request_id: RequestId
    epoch: Epoch
    block_hashes: tuple[BlockHash, ...]


class Abort(Message, frozen=True, kw_only=True):
    """Forget this sequence in whatever state it is and free its blocks."""

    request_id: RequestId
    epoch: Epoch


class Release(Message, frozen=True, kw_only=True):
    """The offered KV blocks have been read, or nobody will read them: end the lease."""

    request_id: RequestId
    epoch: Epoch


class Migrate(Message, frozen=True, kw_only=True):
    """Stop computing this sequence after its next token and offer its KV blocks: another instance goes on."""

    request_id: RequestId
    epoch: Epoch


class PeerLost(Message, frozen=True, kw_only=True):
    """An instance died: nothing more will come from this incarnation of it."""

    instance: InstanceId
    incarnation: Name


class ReportBlocks(Message, frozen=True, kw_only=True):
    """Say anew which KV blocks are cached: some of the events were lost, or none was heard yet."""


class AuditBlocks(Message, frozen=True, kw_only=True):
    """Say at once which state every KV block is in, and which contradict the books; answer with Audited."""

    number: Count


class MeasureLink(Message, frozen=True, kw_only=True):
    """Measure how fast the KV pool of ``source`` is read from here; answer with LinkMeasured.

    ``pool`` is its address, ``access`` the capability to be sent bytes that are no request's.
    """

    source: InstanceId
    incarnation: Name
    pool: bytes
    access: bytes


class Stop(Message, frozen=True, kw_only=True):
    """End the instance; what it still holds is dropped."""


# Engine to router ---------------------------------------------------------------------------------------------


class InstanceFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What start-up found out about an instance."""

    pid: Count
    device: Name
    kernel_backend: Name
    num_blocks: Positive
    block_size: Positive
    max_model_len: Positive
    vocab_size: Positive
    weight_bytes: Count
    kv_bytes: Count
    load_s: Seconds
    pool: bytes
    limits: StepLimits = StepLimits()
    kv_layout: Name = ""
    """In words: instances whose words differ cannot read each other's KV blocks. Their sizes are compared apart."""
    max_host_blocks: Count = 0
    max_disk_blocks: Count = 0
    """KV blocks that it may keep in host memory behind a device's pool, on disk, and that are there from before."""
    num_saved_blocks: Count = 0
    probe: bytes = b""
    """The capability to measure how fast its pool is read; empty where none is asked for."""
    window: WindowBlocks | None = None
    """Which blocks hold the layers with a sliding window, where those have blocks of their own."""

    @property
    def pool_tokens(self) -> int:
        """Tokens that its KV pool holds at least: as many as it does while every layer sees all of them."""
        return self.num_blocks * self.block_size // (1 if self.window is None else 1 + self.window.num_each)


class Loading(Message, frozen=True, kw_only=True):
    """Progress of an instance that is starting; ``fraction`` from 0 to 1."""

    instance: InstanceId
    stage: Name
    fraction: Annotated[float, Meta(ge=0.0, le=1.0)]


class Ready(Message, frozen=True, kw_only=True):
    """The instance takes requests. ``incarnation`` is new at every start."""

    version: int
    instance: InstanceId
    incarnation: Name
    role: Role
    facts: InstanceFacts


class StageStamps(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """When a sequence passed each stage on one instance, monotonic seconds; 0 for a stage it did not pass.

    ``received`` at the instance, ``pull_started`` and ``pulled`` of its KV blocks, ``scheduled`` in its first step,
    ``first_step_done`` when that first token of this instance was there.
    """

    received_s: Seconds = 0.0
    pull_started_s: Seconds = 0.0
    pulled_s: Seconds = 0.0
    scheduled_s: Seconds = 0.0
    first_step_done_s: Seconds = 0.0


class SequenceOutput(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one sequence. ``stamps`` come with the first output of each instance."""

    request_id: RequestId
    epoch: Epoch
    token_ids: tuple[TokenId, ...]
    finish_reason: FinishReason | None = None
    stop_token_id: TokenId | None = None
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    num_cached_tokens: Count = 0
    stamps: StageStamps | None = None


class StepOutput(Message, frozen=True, kw_only=True):
    """Everything that one step of an instance brought forth."""

    outputs: tuple[SequenceOutput, ...]


class Offered(Message, frozen=True, kw_only=True):
    """The prefill of a sequence is done and its KV blocks are leased; sent after its first token."""

    offer: KvOffer


class PartOffered(Message, frozen=True, kw_only=True):
    """Some KV blocks of a sequence can be read while it is still being computed."""

    offer: KvOffer


class NotHeld(Message, frozen=True, kw_only=True):
    """None of the KV blocks that were to be lent is cached any more."""

    request_id: RequestId
    epoch: Epoch


class Pulled(Message, frozen=True, kw_only=True):
    """The KV blocks of an adopted sequence have arrived, or will never be read: the source may free them.

    ``num_bytes`` is 0 and ``failure`` says why when the pull did not succeed; the instance then computes the blocks
    itself, so that the sequence is slower but not lost.
    """

    request_id: RequestId
    epoch: Epoch
    source: InstanceId
    num_bytes: Count
    duration_s: Seconds
    failure: Words = ""
    link: Name = ""
    """What carried the blocks."""
    num_repeated: Count = 0
    """Blocks that came with another digest and were pulled again."""
    overlapped_s: Seconds = 0.0
    """What of ``duration_s`` passed while the sequence was still being computed."""


class FailureKind(enum.Enum):
    """Why an instance gave a sequence back."""

    TOO_LONG = "too_long"
    INVALID = "invalid"
    """Its own parameters make it impossible."""
    INTERNAL = "internal"


class Failed(Message, frozen=True, kw_only=True):
    """The instance cannot continue the sequence."""

    request_id: RequestId
    epoch: Epoch
    kind: FailureKind
    message: Words


class InstanceLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How busy an instance is. Counters (``_total``) grow from the instance's start. Borrowed cores are others'."""

    num_running: Count = 0
    num_waiting: Count = 0
    num_leases: Count = 0
    blocks_total: Count = 0
    blocks_free: Count = 0
    blocks_active: Count = 0
    blocks_leased: Count = 0
    blocks_filling: Count = 0
    blocks_cached: Count = 0
    blocks_quarantined: Count = 0
    num_preemptions_total: Count = 0
    num_steps_total: Count = 0
    num_prefill_tokens_total: Count = 0
    num_decode_tokens_total: Count = 0
    num_prefix_queries_total: Count = 0
    num_prefix_hits_total: Count = 0
    num_prefix_pulled_total: Count = 0
    """Tokens whose KV another instance lent, and those whose KV came from host memory and from disk."""
    num_prefix_from_host_total: Count = 0
    num_prefix_loaded_total: Count = 0
    blocks_on_host: Count = 0
    blocks_on_disk: Count = 0
    num_leases_expired_total: Count = 0
    borrowed_core_seconds_total: Seconds = 0.0
    num_steps_timed_total: Count = 0
    """Steps that were predicted and measured; their seconds, and the predicted ones."""
    step_seconds_total: Seconds = 0.0
    step_predicted_seconds_total: Seconds = 0.0
    step_error: Annotated[float, Meta(ge=0, le=1)] = 0.0
    """Running mean of the absolute error of predicted step times, as a part of what they took."""


class LoadReport(Message, frozen=True, kw_only=True):
    """Sent when sequences came or went, at most every 50 ms, and at least once a second as a sign of life."""

    instance: InstanceId
    incarnation: Name
    load: InstanceLoad
    foreign: ForeignLoad = ForeignLoad()
    """What of it is not the work of the router that this is sent to."""


class StepCosts(msgspec.Struct, frozen=True, array_like=True):
    """Seconds that parts of a step take, which add up: see ``costs.step_costs``."""

    step_s: Seconds
    token_s: Seconds
    """Of each new token."""
    square_s: Seconds
    """Of each square of prefill attention."""
    prefill_s: Seconds
    """Of each chunk of prefill."""
    context_s: Seconds
    """Of each token that decodes attend to."""
    decode_s: Seconds
    """Of each decode, beside its new token."""


class CostsLearned(Message, frozen=True, kw_only=True):
    """What the instance has learned of its steps, and from how many of them, with prefill and without."""

    instance: InstanceId
    incarnation: Name
    costs: StepCosts
    num_prefill_steps: Count
    num_decode_steps: Count


class LinkFigure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How fast one instance reads the KV pool of another. ``failure`` says why it could not be measured."""

    link: Name = ""
    """What carries the bytes, and why this."""
    why: Words = ""
    bytes_per_s: BytesPerSecond = 0.0
    latency_s: Seconds = 0.0
    """From the request for bytes to the first of them."""
    limit_bytes_per_s: BytesPerSecond = 0.0
    """What the hardware between the two gives, as far as it can be found out; 0 where it cannot."""
    limit: Name = ""
    """What that is the speed of."""
    failure: Words = ""


class LinkMeasured(Message, frozen=True, kw_only=True):
    """How fast this instance reads the pool of that life of ``source``."""

    instance: InstanceId
    incarnation: Name
    source: InstanceId
    source_incarnation: Name
    figure: LinkFigure


class Audited(Message, frozen=True, kw_only=True):
    """The KV blocks of an instance at one instant. ``faults`` name each block that breaks the sum, in words."""

    instance: InstanceId
    incarnation: Name
    number: Count
    load: InstanceLoad
    faults: tuple[Words, ...] = ()


class KvEvents(Message, frozen=True, kw_only=True):
    """What became of the instance's cached KV blocks; ``number`` counts these messages, from 0 in each life."""

    instance: InstanceId
    incarnation: Name
    number: EventNumber
    events: tuple[AnyKvEvent, ...]


ToEngine = (
    Generate
    | Adopt
    | Reserve
    | MoreKv
    | Lend
    | Abort
    | Release
    | Migrate
    | PeerLost
    | ReportBlocks
    | AuditBlocks
    | MeasureLink
    | JoinRouter
    | LeaveRouter
    | Stop
)
ToRouter = (
    Loading
    | Ready
    | StepOutput
    | Offered
    | PartOffered
    | NotHeld
    | Pulled
    | Failed
    | LoadReport
    | CostsLearned
    | LinkMeasured
    | Audited
    | KvEvents
)

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoders raise for bytes that are none of their messages."""

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_to_router: msgspec.msgpack.Decoder[ToRouter] = msgspec.msgpack.Decoder(ToRouter)


def encode(message: Message) -> bytes:
    """Return the bytes of one message; raise ProtocolError when it is too long to be accepted."""
    data = _encoder.encode(message)
    _check_length(data)
    return data


def decode_for_engine(data: bytes) -> ToEngine:
    """Decode a message that the router sent; raise ProtocolError on anything else."""
    return decode_message(data, _to_engine, "message to an engine")


def decode_for_router(data: bytes) -> ToRouter:
    """Decode a message that an engine sent; raise ProtocolError on anything else."""
    return decode_message(data, _to_router, "message to the router")


def decode_message(data: bytes, decoder: msgspec.msgpack.Decoder[T], what: str) -> T:
    """Decode by schema; raise ProtocolError, with the words for ``what`` it ought to be, on anything else."""
    _check_length(data)
    try:
        return decoder.decode(data)
    except UNREADABLE as error:
        raise ProtocolError(f"malformed {what}: {error}") from error


def _check_length(data: bytes) -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ProtocolError(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
