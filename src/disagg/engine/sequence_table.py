"""The token values of the sequences that an instance's core knows, and what the core may know of them."""

from collections.abc import Sequence
from itertools import chain

from msgspec import structs

from disagg.base.errors import InternalError
from disagg.base.ids import Epoch, RequestId
from disagg.base.kv_events import BlockStored
from disagg.base.messages import KvEvents
from disagg.base.request import GenerationRequest
from disagg.engine.executor import Work
from disagg.engine.grammar import Grammars
from disagg.engine.sequences import LiveSequence
from disagg.scheduling.instance.inputs import SequenceFacts
from disagg.scheduling.step.actions import Chunk


class SequenceTable:
    """Live sequences by name; a newer attempt takes the place of an older one.

    ``block_size`` is that of the KV blocks which are kept for reuse; 0 keeps none.
    """

    def __init__(self, vocab_size: int, block_size: int = 0, grammars: Grammars | None = None) -> None:
        self._vocab_size = vocab_size
        self._block_size = block_size
        self._grammars = grammars
        self._sequences: dict[RequestId, LiveSequence] = {}

    def works(self, chunks: Sequence[Chunk]) -> list[Work]:
        """Return a step's chunks with their sequences."""
        sequences = self._sequences
        try:
            return [Work(sequences[chunk.request_id], chunk) for chunk in chunks]
        except KeyError as error:
            raise InternalError(f"the core knows sequence {error.args[0]}, the engine does not") from None

    def add(self, request: GenerationRequest) -> SequenceFacts:
        """Keep a sequence's tokens until ``drop``, and return what the core is told of it."""
        sequence = self._sequences.get(request.request_id)
        if sequence is None or sequence.epoch < request.epoch:
            grammar = None if self._grammars is None else self._grammars.state_of(request)
            sequence = LiveSequence(request, self._block_size, grammar)
            self._sequences[request.request_id] = sequence
        return self._facts(request, sequence)

    def facts_of(self, request: GenerationRequest) -> SequenceFacts:
        """Return what the core is told of a sequence that another instance computes; nothing of it is kept."""
        return self._facts(request, LiveSequence(request, self._block_size))

    def _facts(self, request: GenerationRequest, sequence: LiveSequence) -> SequenceFacts:
        return SequenceFacts(
            request_id=request.request_id,
            epoch=request.epoch,
            num_tokens=request.num_tokens,
            max_total_tokens=request.max_total_tokens,
            priority=request.priority,
            arrival_s=request.arrival_s,
            block_hashes=sequence.block_hashes,
            reuse_prefix=not LiveSequence.reports_prompt_logprobs(request),
            objectives=request.objectives,
            fault=self._fault(request),
        )

    def drop(self, request_id: RequestId, epoch: Epoch) -> None:
        """Forget an attempt, unless a newer one has taken its place."""
        known = self._sequences.get(request_id)
        if known is not None and known.epoch == epoch:
            del self._sequences[request_id]

    def with_tokens(self, message: KvEvents, owners: Sequence[tuple[RequestId, int] | None]) -> KvEvents:
        """Return the message with the tokens of the blocks that were stored, where their sequence is still known."""
        events = [
            structs.replace(event, token_ids=self._tokens(owner, len(event.block_hashes)))
            if isinstance(event, BlockStored) and owner is not None
            else event
            for event, owner in zip(message.events, owners, strict=True)
        ]
        return structs.replace(message, events=tuple(events))

    def _tokens(self, owner: tuple[RequestId, int], num_blocks: int) -> tuple[int, ...]:
        request_id, first_block = owner
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return ()
        start = first_block * self._block_size
        return tuple(sequence.tokens[start : start + num_blocks * self._block_size].tolist())

    def _fault(self, request: GenerationRequest) -> str:
        """Return why a request cannot be computed, if so; a wrong token id would otherwise end the whole instance."""
        if not request.prompt_token_ids:
            return "the prompt has no tokens"
        if len(request.output_token_ids) >= request.sampling.max_tokens:
            return f"all of max_tokens ({request.sampling.max_tokens}) are already generated"
        if request.sampling.grammar and self._grammars is None:
            return "this instance has no tokenizer, which a grammar needs"
        if bad := _outside(request, self._vocab_size):
            return f"token id {bad[0]} is outside the vocabulary of {self._vocab_size}"
        return ""


def _outside(request: GenerationRequest, vocab_size: int) -> list[int]:
    """Return ids, of tokens or in sampling parameters, that the model has no logit for."""
    sampling = request.sampling
    biased = [token_id for token_id, _ in sampling.logit_bias]
    words = chain.from_iterable(sampling.bad_words)
    ids = (
        *request.output_token_ids,
        *request.eos_token_ids,
        *sampling.stop_token_ids,
        *sampling.allowed_token_ids,
        *biased,
        *words,
    )
    extremes = (min(request.prompt_token_ids), max(request.prompt_token_ids))
    return [token_id for token_id in (*extremes, *ids) if not 0 <= token_id < vocab_size]
