"""From the router's messages to the scheduler's events, with the table of live sequences kept beside it."""

from typing import assert_never

from disagg.base.ids import Epoch, RequestId
from disagg.base.messages import (
    Abort,
    Adopt,
    Failed,
    FailureKind,
    Generate,
    InstanceFacts,
    KvOffer,
    Message,
    PeerLost,
    Pulled,
    Release,
)
from disagg.base.request import GenerationRequest
from disagg.engine.pulls import PullResult, Pulls
from disagg.engine.sequences import LiveSequence
from disagg.scheduling.epoch_memory import EpochMemory
from disagg.scheduling.step import events
from disagg.scheduling.step.events import AnyEvent
from disagg.transfer.link import TransferState

EngineMessage = Generate | Adopt | Abort | Release | PeerLost


class Inbox:
    """Turns what comes in into events and knows every live sequence."""

    def __init__(self, facts: InstanceFacts, pulls: Pulls) -> None:
        self._facts = facts
        self._pulls = pulls
        self._sequences: dict[RequestId, LiveSequence] = {}
        self._ended = EpochMemory()
        self._replies: list[Message] = []

    def take_replies(self) -> list[Message]:
        """Return the refusals since the last call."""
        replies, self._replies = self._replies, []
        return replies

    def find(self, request_id: RequestId, epoch: Epoch | None = None) -> LiveSequence | None:
        """Return a live sequence, of any epoch or of the given one."""
        sequence = self._sequences.get(request_id)
        return sequence if sequence is not None and epoch in (None, sequence.epoch) else None

    def drop(self, request_id: RequestId, epoch: Epoch) -> None:
        """Forget a sequence that ended here, unless a newer attempt has taken its place."""
        if self.find(request_id, epoch) is not None:
            del self._sequences[request_id]
            self._ended.remember(request_id, epoch)

    def events(self, message: EngineMessage, now: float) -> list[AnyEvent]:
        """Return what a message means to the scheduler; nothing when it is refused or out of date."""
        match message:
            case Generate(request=request):
                return self._on_generate(request, message.hand_over, now)
            case Adopt(request=request, offer=offer):
                return self._on_adopt(request, offer, now)
            case Abort(request_id=request_id, epoch=epoch):
                if (sequence := self.find(request_id, epoch)) is not None:
                    sequence.abandoned = "aborted"
                    self._pulls.cancel(request_id, epoch)
                return [events.Cancelled(request_id=request_id, epoch=epoch)]
            case Release(request_id=request_id, epoch=epoch):
                return [events.LeaseReleased(request_id=request_id, epoch=epoch)]
            case PeerLost(instance=instance, incarnation=incarnation):
                self._pulls.close_peer(incarnation)
                for sequence in self._sequences.values():
                    if sequence.offer is not None and sequence.offer.incarnation == incarnation:
                        sequence.abandoned = "its source has died"
                return [events.PeerLost(instance=instance)]
            case _:
                assert_never(message)

    def pull_ended(self, result: PullResult) -> AnyEvent:
        """Note the end of a pull and return what it means to the scheduler."""
        sequence = self.find(result.request_id, result.epoch)
        if sequence is not None:
            sequence.pull = result
        if result.state is TransferState.DONE:
            return events.TransferDone(request_id=result.request_id, epoch=result.epoch)
        return events.TransferFailed(request_id=result.request_id, epoch=result.epoch)

    def _on_generate(self, request: GenerationRequest, hand_over: bool, now: float) -> list[AnyEvent]:
        # A handed-over sequence does not grow here.
        longest = request.num_tokens if hand_over else request.max_total_tokens
        if not self._is_news(request) or self._refuses(request, longest):
            return []
        sequence = LiveSequence(request, received_s=now)
        self._sequences[request.request_id] = sequence
        return [
            events.Arrived(
                request_id=request.request_id,
                epoch=request.epoch,
                num_tokens=request.num_tokens,
                max_total_tokens=request.max_total_tokens,
                priority=request.priority,
                arrival_s=request.arrival_s,
                hand_over=hand_over,
                block_hashes=request.block_hashes,
                reuse_prefix=not sequence.wants_prompt_logprobs,
            )
        ]

    def _on_adopt(self, request: GenerationRequest, offer: KvOffer, now: float) -> list[AnyEvent]:
        if not self._is_news(request):
            return []
        if self._refuses(request, request.max_total_tokens, offer):
            unread = Pulled(
                request_id=request.request_id,
                epoch=request.epoch,
                source=offer.source,
                num_bytes=0,
                duration_s=0.0,
                failure="the sequence was refused",
            )
            self._replies.append(unread)
            return []
        self._sequences[request.request_id] = LiveSequence(request, received_s=now, offer=offer)
        return [
            events.KvOffered(
                request_id=request.request_id,
                epoch=request.epoch,
                num_tokens=request.num_tokens,
                max_total_tokens=request.max_total_tokens,
                source=offer.source,
                source_blocks=offer.block_ids,
                num_kv_tokens=offer.num_tokens,
                expires_s=offer.expires_s,
                priority=request.priority,
                arrival_s=request.arrival_s,
                block_hashes=request.block_hashes,
            )
        ]

    def _is_news(self, request: GenerationRequest) -> bool:
        """False for a message that the scheduler will ignore, too: a repeated one, or an old epoch."""
        known = self.find(request.request_id)
        is_newer = known is None or known.epoch < request.epoch
        return is_newer and not self._ended.has_ended(request.request_id, request.epoch)

    def _refuses(self, request: GenerationRequest, longest: int, offer: KvOffer | None = None) -> bool:
        """Answer a request that cannot be computed; a wrong token id would otherwise end the whole instance."""
        kind, reason = FailureKind.INTERNAL, ""
        if longest > self._facts.max_model_len:
            kind = FailureKind.TOO_LONG
            reason = f"the sequence can grow to {longest} tokens, the instance's limit is {self._facts.max_model_len}"
        elif not request.prompt_token_ids:
            reason = "the prompt has no tokens"
        elif len(request.output_token_ids) >= request.sampling.max_tokens:
            reason = f"all of max_tokens ({request.sampling.max_tokens}) are already generated"
        elif bad := _outside(request, self._facts.vocab_size):
            reason = f"token id {bad[0]} is outside the vocabulary of {self._facts.vocab_size}"
        elif offer is not None and not _belongs(offer, request):
            reason = (
                f"the offer of {offer.num_tokens} tokens of {offer.request_id} (epoch {offer.epoch}) does not belong "
                f"to a sequence of {request.num_tokens} tokens (epoch {request.epoch})"
            )
        if reason:
            self._replies.append(
                Failed(request_id=request.request_id, epoch=request.epoch, kind=kind, message=reason),
            )
        return bool(reason)


def _outside(request: GenerationRequest, vocab_size: int) -> list[int]:
    """Return ids, of tokens or in sampling parameters, that the model has no logit for."""
    sampling = request.sampling
    biased = [token_id for token_id, _ in sampling.logit_bias]
    ids = (*request.output_token_ids, *request.eos_token_ids, *sampling.stop_token_ids, *biased)
    extremes = (min(request.prompt_token_ids), max(request.prompt_token_ids))
    return [token_id for token_id in (*extremes, *ids) if not 0 <= token_id < vocab_size]


def _belongs(offer: KvOffer, request: GenerationRequest) -> bool:
    same = (offer.request_id, offer.epoch) == (request.request_id, request.epoch)
    return same and 0 < offer.num_tokens < request.num_tokens
