"""What an instance knows of its sequences that its core does not: the values of tokens, and how they may end."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

import msgspec
import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from disagg.base.block_hash import first_link, hash_blocks, names_for
from disagg.base.errors import InternalError
from disagg.base.ids import BlockHash, BlockId, Epoch, RequestId
from disagg.base.kv_events import BlockStored
from disagg.base.messages import FailureKind, KvEvents
from disagg.base.request import GenerationRequest
from disagg.base.sampling import FinishReason, PositionLogprobs, SamplingParams
from disagg.engine.grammar import Grammars, GrammarState
from disagg.engine.model.adjustments import SamplingRow
from disagg.scheduling.instance.inputs import SequenceFacts
from disagg.scheduling.step.actions import Chunk

_NO_TABLE: Final[tuple[tuple[BlockId, ...], NDArray[np.int32]]] = ((), np.empty(0, dtype=np.int32))


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """Why a sequence cannot go on: a fault of its own, which is no other sequence's."""

    kind: FailureKind
    message: str


class LiveSequence:
    """One sequence on this instance.

    ``tokens`` int64 [capacity]: prompt, then output; the first ``num_tokens`` are known. ``block_size`` is that of this
    instance's KV blocks which are named for reuse; 0 where none is.
    """

    def __init__(self, request: GenerationRequest, block_size: int = 0, grammar: GrammarState | None = None) -> None:
        self.request = request
        self.request_id: RequestId = request.request_id
        self.epoch: Epoch = request.epoch
        self.sampling: SamplingParams = request.sampling
        self.takes_most_likely = request.sampling.takes_most_likely
        self.wants_prompt_logprobs = self.reports_prompt_logprobs(request)
        self.row: SamplingRow | None = None
        """What the sampler knows of it, kept by the executor."""
        self.grammar = grammar
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_tokens = request.num_tokens
        self.tokens = np.empty(request.num_tokens + 64, dtype=np.int64)
        self.tokens[: self.num_prompt_tokens] = request.prompt_token_ids
        self.tokens[self.num_prompt_tokens : self.num_tokens] = request.output_token_ids
        self.finished: FinishReason | None = None
        """Why no further token is wanted."""
        self.stop_token_id: int | None = None
        """The token that ended it, where one did."""
        self.failure: SequenceFailure | None = None
        self._block_size = block_size
        self._hash_size = request.hash_block_size if self._is_named(block_size) else 0
        self._names: tuple[BlockHash, ...] = request.block_hashes if self._hash_size else ()
        self._name_blocks()
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._window_table = _NO_TABLE
        self._stop_token_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self._stop_token_ids |= frozenset(request.eos_token_ids)
        self._may_stop_at = self.num_prompt_tokens + request.sampling.min_tokens
        self._ends_at = self.num_prompt_tokens + request.sampling.max_tokens
        self.last_token_id = int(self.tokens[self.num_tokens - 1]) if self.num_tokens else 0
        self._plain_until = self._next_due()

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, those of earlier instances included."""
        return self.num_tokens - self.num_prompt_tokens

    @staticmethod
    def reports_prompt_logprobs(request: GenerationRequest) -> bool:
        """Return whether an instance that is given this is to report the prompt's own log-probabilities.

        A sequence that comes with output had them reported by the instance that sampled its first token.
        """
        return request.sampling.prompt_logprobs is not None and not request.output_token_ids

    def append(self, token_id: int) -> tuple[BlockHash, ...]:
        """Add a sampled token; ``finished`` says afterwards whether the sequence ends with it.

        Returns the names of the KV blocks, at most one, that it fills.
        """
        position = self.num_tokens
        if position < self._plain_until and token_id not in self._stop_token_ids:
            self.tokens[position] = self.last_token_id = token_id
            self.num_tokens = position + 1
            return ()
        names = self._append_with_care(token_id, position)
        self._plain_until = self._next_due()
        return names

    def _next_due(self) -> int:
        """Return up to how many known tokens another one changes nothing, unless it is a stop token."""
        if self.grammar is not None:
            return 0
        due = min(len(self.tokens), self._ends_at - 1)
        size = self._hash_size
        return min(due, (len(self._names) + 1) * size - 1) if size else due

    def _append_with_care(self, token_id: int, position: int) -> tuple[BlockHash, ...]:
        if position == len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.empty_like(self.tokens)])
        self.tokens[position] = self.last_token_id = token_id
        self.num_tokens = position + 1
        if self.grammar is not None:
            self.grammar.accept(token_id)
        if token_id in self._stop_token_ids and position >= self._may_stop_at:
            self.finished = FinishReason.STOP
            self.stop_token_id = token_id
        elif self.grammar is not None and self.grammar.is_complete:
            self.finished = FinishReason.STOP
        elif self.num_tokens >= self._ends_at:
            self.finished = FinishReason.LENGTH
        return self._name_blocks()

    @property
    def block_hashes(self) -> tuple[BlockHash, ...]:
        """Names of the KV blocks that the known tokens fill."""
        return names_for(self._names, self._hash_size, self._block_size)

    def _is_named(self, block_size: int) -> bool:
        """Return whether all full blocks of the prompt have names, to which those of the answer can be chained.

        They are of the request's ``hash_block_size``, of which blocks here must be a multiple.
        """
        size = self.request.hash_block_size
        if not size or not block_size or block_size % size:
            return False
        return len(self.request.block_hashes) == self.num_prompt_tokens // size

    def _name_blocks(self) -> tuple[BlockHash, ...]:
        """Name the blocks that the known tokens fill and that have no names; return the new names."""
        size, known = self._hash_size, self._names
        if not size or self.num_tokens // size == len(known):
            return ()
        last = known[-1] if known else first_link(self.request.cache_salt)
        self._names += hash_blocks(self.tokens[len(known) * size : self.num_tokens].tolist(), size, last)
        num_known = len(known) * size // self._block_size
        return self.block_hashes[num_known:]

    def window_table(self, window_ids: tuple[BlockId, ...]) -> NDArray[np.int32]:
        """Return a chunk's ``window_ids`` as an array. The scheduler hands out the same tuple until they change."""
        if window_ids is not self._window_table[0]:
            self._window_table = window_ids, np.array(window_ids, dtype=np.int32)
        return self._window_table[1]

    def add_prompt_logprobs(self, first_position: int, logprobs: Sequence[PositionLogprobs]) -> None:
        """Collect those of the prompt tokens from ``first_position`` on; a recomputed chunk brings nothing new."""
        num_known = len(self._prompt_logprobs) + 1  # the token at position 0 has none
        self._prompt_logprobs.extend(logprobs[max(0, num_known - first_position) :])

    def take_prompt_logprobs(self) -> tuple[PositionLogprobs, ...]:
        """Return the prompt's log-probabilities, which go with the first output of this instance."""
        prompt_logprobs = tuple(self._prompt_logprobs)
        self._prompt_logprobs.clear()
        return prompt_logprobs


class Work(msgspec.Struct, frozen=True, gc=False):
    """One chunk of a step, with the sequence it belongs to."""

    sequence: LiveSequence
    chunk: Chunk


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
