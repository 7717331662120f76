"""What is done to logits before a token is chosen: forbidden ends, biases, penalties. Meanings and order are vLLM's.

Every adjustment touches a few tokens of a row, so each is one gather and one scatter for all rows together.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from disagg.base.sampling import SamplingParams


class AllowsTokens(Protocol):
    """What a grammar says of the next token of its sequence."""

    failure: str
    """Why it allows none any more, if so."""

    def fill(self, allowed: npt.NDArray[np.uint32]) -> None:
        """Set the bits of the tokens that may come next, and no others."""


class SamplingRow:
    """What sampling knows of one sequence. Made once per sequence; ``append`` keeps it up to date.

    ``position`` is the index that the next token will have: the number of tokens so far. Token ids (those of
    ``logit_bias`` included) must be below the vocabulary's size. ``grammar`` keeps itself up to date.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        grammar: AllowsTokens | None = None,
    ) -> None:
        self.params = params
        self.grammar = grammar
        self.restriction = _Restriction(params) if params.allowed_token_ids or params.bad_words else None
        self.position = len(prompt_token_ids)
        self.num_output_tokens = 0
        self.end_token_ids = np.unique(np.asarray([*eos_token_ids, *params.stop_token_ids], dtype=np.int64))
        self.seen = _SeenTokens(prompt_token_ids) if params.penalizes else None
        self._always_adjusts = self.seen is not None or bool(params.logit_bias)
        self._may_have_to_go_on = params.min_tokens > 0
        for token_id in output_token_ids:
            self.append(token_id)

    def append(self, token_id: int) -> None:
        """Note the next token of the sequence."""
        self.position += 1
        self.num_output_tokens += 1
        if self.seen is not None:
            self.seen.count(token_id)
        if self.restriction is not None:
            self.restriction.append(token_id)

    def extend(self, token_ids: npt.NDArray[np.int64]) -> None:
        """Note the next tokens of the sequence."""
        if self.seen is None and self.restriction is None:
            self.position += len(token_ids)
            self.num_output_tokens += len(token_ids)
            return
        for token_id in token_ids.tolist():
            self.append(token_id)

    @property
    def restricts(self) -> bool:
        """Whether only some tokens may be chosen; ``fill`` says which."""
        return self.grammar is not None or self.restriction is not None

    def fill(self, allowed: npt.NDArray[np.uint32]) -> None:
        """Set the bits of the tokens that may be chosen, the lowest of a word first, and no others."""
        if self.grammar is not None:
            self.grammar.fill(allowed)
        else:
            allowed.fill(0xFFFFFFFF)
        if self.restriction is not None:
            self.restriction.narrow(allowed)

    @property
    def adjusts(self) -> bool:
        """Whether the row's logits are changed before a token is chosen."""
        return self._always_adjusts or (self._may_have_to_go_on and self.must_go_on)

    @property
    def must_go_on(self) -> bool:
        """Whether the tokens that would end the sequence are forbidden now."""
        return self.num_output_tokens < self.params.min_tokens and self.end_token_ids.size > 0

    def is_to_blame(self, logits: torch.Tensor) -> bool:
        """Whether it is the parameters that leave no token to choose in these ``logits`` [vocab], adjusted or not.

        Then all logits that they do not touch are sound, if there are any.
        """
        if self.restricts:
            return True
        if not self.adjusts:
            return False
        touched = [token_id for token_id, _ in self.params.logit_bias]
        touched += self.end_token_ids.tolist() if self.must_go_on else []
        touched += self.seen.ids.tolist() if self.seen is not None else []
        others = torch.ones(logits.shape, dtype=torch.bool, device=logits.device)
        others[touched] = False
        return not bool(others.any()) or bool(logits[others].max().isfinite())


class _Restriction:
    """``allowed_token_ids`` and ``bad_words`` of one sequence, and as much of its output's end as these look at."""

    def __init__(self, params: SamplingParams) -> None:
        self._allowed_ids = np.array(params.allowed_token_ids, dtype=np.int64)
        self._listed: npt.NDArray[np.uint32] | None = None
        """The bits of ``allowed_token_ids``, from the first use on."""
        self._bad_words = params.bad_words
        self._num_remembered = max(map(len, params.bad_words), default=1) - 1
        self._end: tuple[int, ...] = ()

    def append(self, token_id: int) -> None:
        self._end = (*self._end, token_id)[-self._num_remembered :] if self._num_remembered else ()

    def narrow(self, allowed: npt.NDArray[np.uint32]) -> None:
        """Clear the bits of tokens that may not be chosen."""
        if self._allowed_ids.size:
            if self._listed is None:
                self._listed = np.zeros_like(allowed)
                bits = np.left_shift(np.uint32(1), (self._allowed_ids & 31).astype(np.uint32))
                np.bitwise_or.at(self._listed, self._allowed_ids >> 5, bits)
            allowed &= self._listed
        for word in self._bad_words:
            if word[:-1] == self._end[len(self._end) - len(word) + 1 :]:
                allowed[word[-1] >> 5] &= ~np.uint32(1 << (word[-1] & 31))


class _SeenTokens:
    """The distinct tokens of a sequence and how often each is in its output, in arrays that grow by doubling."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        distinct = np.unique(np.asarray(prompt_token_ids, dtype=np.int64))
        self._slot_of = {token_id: slot for slot, token_id in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(distinct.size, dtype=np.float32)

    def count(self, token_id: int) -> None:
        slot = self._slot_of.setdefault(token_id, len(self._slot_of))
        if slot >= self._ids.size:
            spare = max(16, self._ids.size)
            self._ids = np.concatenate((self._ids, np.zeros(spare, dtype=np.int64)))
            self._counts = np.concatenate((self._counts, np.zeros(spare, dtype=np.float32)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Distinct tokens of prompt and output, in no order."""
        return self._ids[: len(self._slot_of)]

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """How often each of ``ids`` is in the output."""
        return self._counts[: len(self._slot_of)]


def adjust_logits(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> None:
    """Change ``logits`` [B, vocab], contiguous, in place as the rows' parameters say."""
    flat = logits.view(-1)
    vocab_size = logits.shape[1]
    _forbid_ends(flat, rows, vocab_size)
    _add_biases(flat, rows, vocab_size)
    _penalize(flat, rows, vocab_size)


def _forbid_ends(flat: torch.Tensor, rows: Sequence[SamplingRow], vocab_size: int) -> None:
    places = [row.end_token_ids + index * vocab_size for index, row in enumerate(rows) if row.must_go_on]
    if places:
        flat[_tensor(places, flat.device)] = float("-inf")


def _add_biases(flat: torch.Tensor, rows: Sequence[SamplingRow], vocab_size: int) -> None:
    places, biases = [], []
    for index, row in enumerate(rows):
        for token_id, bias in row.params.logit_bias:
            places.append(index * vocab_size + token_id)
            biases.append(bias)
    if places:
        flat.index_add_(0, torch.tensor(places, device=flat.device), torch.tensor(biases, device=flat.device))


def _penalize(flat: torch.Tensor, rows: Sequence[SamplingRow], vocab_size: int) -> None:
    """Repetition divides or multiplies over prompt and output; frequency and presence subtract over the output."""
    seen = [(index, row.params, row.seen) for index, row in enumerate(rows) if row.seen is not None]
    if not seen:
        return
    device = flat.device
    places = _tensor((tokens.ids + index * vocab_size for index, _, tokens in seen), device)
    repetition = _tensor(
        (np.full(tokens.ids.size, params.repetition_penalty, np.float32) for _, params, tokens in seen), device
    )
    subtracted = _tensor(
        (
            params.frequency_penalty * tokens.counts + np.float32(params.presence_penalty) * (tokens.counts > 0)
            for _, params, tokens in seen
        ),
        device,
    )
    values = flat[places]
    flat[places] = torch.where(values > 0, values / repetition, values * repetition) - subtracted


def _tensor(parts: Iterable[npt.NDArray[np.generic]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(parts))).to(device)
