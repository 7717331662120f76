"""Choosing the next token of every sequence in a step.

A token is drawn by the Gumbel-max rule, argmax(log p + noise), because the noise belongs to the token: a small change
of the logits (another batch, another chunking, another kernel) seldom changes the choice. It is drawn as a race: with
E exponential, -log E is Gumbel noise, and the token with the least time E / p wins. Likely tokens, and all that a
truncation keeps, draw E by a hash. The unlikely ones of a whole row, which are many and seldom win, have the equivalent
in arrivals (``noise.arrivals``): a handful of them come before the winner, so that no vocabulary is hashed or summed.

What is here is the definition, for any device. A backend that chooses tokens by itself follows the same rules.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from disagg.base.sampling import PositionLogprobs, SamplingParams
from disagg.engine.kernels.interface import NOT_FINITE, UNDECIDED, ChoosesTokens, DrawSettings, KernelBackend
from disagg.engine.model.adjustments import SamplingRow, adjust_logits
from disagg.engine.model.logprobs import position_logprobs
from disagg.engine.model.noise import SEED_MASK, arrivals, noise_key, num_arrivals, race_times, uniform

_LOWEST_TEMPERATURE: Final = 1e-5
"""Below it the most likely token is taken, as in vLLM: the division would overflow."""

_HEAD_FLOOR: Final = -9.0
"""Log-probability above which a token is likely: at most e^9 = 8103 tokens of any row."""


class SampledToken(msgspec.Struct, frozen=True, gc=False):
    """The chosen token, with log-probabilities where the row's parameters ask for them."""

    token_id: int
    logprobs: PositionLogprobs | None = None


def chooser_of(backend: KernelBackend) -> ChoosesTokens | None:
    """Return the backend if it chooses tokens by itself."""
    return backend if isinstance(backend, ChoosesTokens) else None


def sample(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    chooser: ChoosesTokens | None = None,
    known: npt.NDArray[np.int64] | None = None,
) -> list[SampledToken | None]:
    """Choose one token for each row of ``logits`` [B, vocab], which may be overwritten; by ``chooser`` where it can.

    ``known`` are the most likely tokens of all rows, where they are known, UNDECIDED where not.
    The choice depends on the row's logits, parameters, tokens and position alone, not on the other rows.
    None for a row without a finite maximum, from which nothing can be chosen.
    """
    if not rows:
        return []
    reported = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    raw = logits
    if reported:
        raw = logits.float() if len(reported) == len(rows) else logits[reported].float()
    if any(row.adjusts for row in rows):
        known = None
        logits = logits.clone() if raw is logits and reported else logits.float()
        adjust_logits(logits, rows)
    if restricted := [index for index, row in enumerate(rows) if row.restricts]:
        known = None
        logits = logits.clone() if raw is logits and reported else logits
        _forbid(logits, rows, restricted, chooser)
    token_ids = _choose(logits, rows, chooser, known)
    if not reported:
        return [SampledToken(token_id) if token_id != NOT_FINITE else None for token_id in token_ids]
    reported_ids = [max(token_ids[index], 0) for index in reported]
    logprobs = position_logprobs(raw, reported_ids, [rows[index].params.logprobs or 0 for index in reported])
    of_row = dict(zip(reported, logprobs, strict=True))
    return [
        SampledToken(token_id, of_row.get(index)) if token_id != NOT_FINITE else None
        for index, token_id in enumerate(token_ids)
    ]


def _forbid(
    logits: torch.Tensor, rows: Sequence[SamplingRow], restricted: Sequence[int], chooser: ChoosesTokens | None
) -> None:
    """Give minus infinity to all tokens that the rows numbered ``restricted`` do not allow, in place.

    On an accelerator the forward pass is still at work while the bits are found.
    """
    allowed = np.zeros((len(restricted), -(-logits.shape[1] // 32)), dtype=np.uint32)
    for bits, index in zip(allowed, restricted, strict=True):
        rows[index].fill(bits)
    numbers = np.array(restricted, dtype=np.int64)
    if chooser is not None:
        chooser.forbid(logits, numbers, allowed)
        return
    each = np.unpackbits(allowed.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little").view(np.bool_)
    forbidden = torch.from_numpy(~each).to(logits.device)
    of_rows = torch.from_numpy(numbers).to(logits.device)
    logits[of_rows] = logits[of_rows].masked_fill(forbidden, float("-inf"))


def _choose(
    logits: torch.Tensor,
    rows: Sequence[SamplingRow],
    chooser: ChoosesTokens | None,
    known: npt.NDArray[np.int64] | None,
) -> list[int]:
    drawn = [index for index, row in enumerate(rows) if row.params.temperature >= _LOWEST_TEMPERATURE]
    if len(drawn) == len(rows):
        return _draw(logits, rows, chooser)
    token_ids = [UNDECIDED] if known is None else known.tolist()
    if UNDECIDED in token_ids:
        token_ids = most_likely(logits, chooser)
    if drawn:
        of_drawn = _draw(logits[drawn], [rows[index] for index in drawn], chooser)
        for index, token_id in zip(drawn, of_drawn, strict=True):
            token_ids[index] = token_id
    return token_ids


def most_likely(logits: torch.Tensor, chooser: ChoosesTokens | None) -> list[int]:
    """Return the first of the largest of each row of ``logits`` [B, vocab].

    NOT_FINITE stands for a row where that is not finite; a NaN counts as the largest.
    """
    if chooser is None:
        return _reference_most_likely(logits.float())
    token_ids: list[int] = chooser.most_likely(logits).tolist()
    return token_ids


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow], chooser: ChoosesTokens | None) -> list[int]:
    """Draw one token for each row by its temperature and truncation."""
    if chooser is None:
        return _reference_draw(logits.float(), rows)
    token_ids: list[int] = chooser.draw(logits, _draw_settings(rows), _HEAD_FLOOR).tolist()
    if undecided := [index for index, token_id in enumerate(token_ids) if token_id == UNDECIDED]:
        rest = _reference_draw(logits[undecided].float(), [rows[index] for index in undecided])
        for index, token_id in zip(undecided, rest, strict=True):
            token_ids[index] = token_id
    return token_ids


def _draw_settings(rows: Sequence[SamplingRow]) -> DrawSettings:
    return DrawSettings(
        temperature=np.array([row.params.temperature for row in rows], dtype=np.float64),
        top_p=np.array([row.params.top_p for row in rows], dtype=np.float64),
        min_p=np.array([row.params.min_p for row in rows], dtype=np.float64),
        top_k=np.array([row.params.top_k for row in rows], dtype=np.int32),
        seed=np.array([row.params.seed & SEED_MASK for row in rows], dtype=np.uint64),
        position=np.array([row.position for row in rows], dtype=np.uint64),
    )


def _reference_most_likely(logits: torch.Tensor) -> list[int]:
    """Return the first of the largest of each row of float32 ``logits``, on any device."""
    if logits.device.type == "cpu":
        values = logits.numpy()
        best = values.argmax(axis=-1)  # ten times as fast as torch's, and a few calls of NumPy as one of torch
        is_finite = np.isfinite(values[np.arange(len(best)), best])
    else:
        found = logits.argmax(dim=-1)
        is_finite = logits.gather(1, found.unsqueeze(1)).squeeze(1).isfinite().cpu().numpy()
        best = found.cpu().numpy()
    token_ids: list[int] = np.where(is_finite, best, NOT_FINITE).tolist()
    return token_ids


def _reference_draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    """Draw one token for each row of float32 ``logits``, on any device."""
    temperatures = [row.params.temperature for row in rows]
    if any(temperature != 1.0 for temperature in temperatures):
        logits = logits / torch.tensor(temperatures, dtype=torch.float32, device=logits.device).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1)
    places, values = _above_floor(logprobs)
    row_of, tokens = np.divmod(places, logits.shape[1])
    starts = np.searchsorted(row_of, np.arange(len(rows) + 1)).tolist()
    keys = np.array([noise_key(row.params.seed, row.position) for row in rows], dtype=np.uint64)
    times = race_times(uniform(keys[row_of], tokens), values)
    winners = []
    for index, (start, end) in enumerate(pairwise(starts)):
        head = _Head(tokens[start:end], values[start:end], times[start:end])
        winners.append(_draw_row(head, rows[index].params, logprobs[index], keys[index : index + 1]))
    _race_unlikely(winners, [index for index, row in enumerate(rows) if not row.params.truncates], logprobs, keys)
    return [winner.token_id for winner in winners]


def _above_floor(logprobs: torch.Tensor) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return where the flattened ``logprobs`` exceed ``_HEAD_FLOOR``, and their values there."""
    flat = logprobs.view(-1)
    if flat.device.type == "cpu":
        places = np.flatnonzero(flat.numpy() > _HEAD_FLOOR)  # twice as fast as torch's nonzero
        return places, flat.numpy()[places].astype(np.float64)
    found = (flat > _HEAD_FLOOR).nonzero().squeeze(1)
    return found.cpu().numpy(), flat[found].cpu().numpy().astype(np.float64)


@dataclass(frozen=True, slots=True)
class _Head:
    """One row's tokens above ``_HEAD_FLOOR`` with their log-probabilities and the times of their race."""

    tokens: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    times: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Winner:
    """Who is first, and when."""

    token_id: int = NOT_FINITE
    time: float = math.inf


def _draw_row(head: _Head, params: SamplingParams, logprobs: torch.Tensor, key: npt.NDArray[np.uint64]) -> _Winner:
    """Return the first of the tokens that truncation keeps; of a row that it leaves whole, the first likely one."""
    floor = _floor(params, head.values, logprobs)
    times = head.times if floor == -math.inf else np.where(head.values >= floor, head.times, math.inf)
    winner = _first(head.tokens, times)
    if not params.truncates or floor > _HEAD_FLOOR:
        return winner
    values = logprobs.cpu().numpy()
    kept = np.flatnonzero((values <= _HEAD_FLOOR) & (values >= floor))
    numbers = uniform(key, kept)
    hopeful = 1.0 - numbers < winner.time * math.exp(_HEAD_FLOOR)  # since -log(u) >= 1 - u, the others are later
    kept = kept[hopeful]
    rest = _first(kept, race_times(numbers[hopeful], values[kept].astype(np.float64)))
    return winner if winner.time <= rest.time else rest


def _first(tokens: npt.NDArray[np.int64], times: npt.NDArray[np.float64]) -> _Winner:
    best = int(times.argmin()) if times.size else -1
    return _Winner(int(tokens[best]), float(times[best])) if best >= 0 and times[best] < math.inf else _Winner()


def _race_unlikely(
    winners: list[_Winner], open_rows: list[int], logprobs: torch.Tensor, keys: npt.NDArray[np.uint64]
) -> None:
    """Replace the winners of ``open_rows``, which truncation leaves whole, where an unlikely token is before them."""
    sound = logprobs[:, 0].isnan().logical_not().tolist()  # a row that is no distribution is NaN throughout
    undecided = np.array([row for row in open_rows if sound[row]], dtype=np.int64)
    vocab_size = logprobs.shape[1]
    bound = math.exp(_HEAD_FLOOR)
    count = num_arrivals(vocab_size, bound)
    since = np.zeros(len(undecided))
    first = 0
    while undecided.size:
        found = arrivals(keys[undecided], vocab_size, bound, since, first, count)
        ends = np.array([winners[row].time for row in undecided])
        values = logprobs[torch.from_numpy(undecided)[:, None], torch.from_numpy(found.tokens)].cpu().numpy()
        accepted = (values <= _HEAD_FLOOR) & (found.marks * bound < np.exp(values.astype(np.float64)))
        accepted &= found.times < ends[:, None]
        for row in np.flatnonzero(accepted.any(axis=1)):
            place = accepted[row].argmax()
            winners[undecided[row]] = _Winner(int(found.tokens[row, place]), float(found.times[row, place]))
        late = ~accepted.any(axis=1) & (found.times[:, -1] < ends)
        undecided, since, first = undecided[late], found.times[late, -1], first + count


def _floor(params: SamplingParams, head: npt.NDArray[np.float64], logprobs: torch.Tensor) -> float:
    """Return the log-probability below which truncation (min-p, then top-k, then top-p) drops a token.

    ``head`` holds the row's log-probabilities above ``_HEAD_FLOOR``; the whole row is sorted only when the cut is
    below it. Tokens as likely as the last one kept are kept.
    """
    if not params.truncates:
        return -math.inf
    floor = _floor_among(params, -np.sort(-head), complete=False)
    if floor is None:
        everything = -np.sort(-logprobs.cpu().numpy())
        floor = _floor_among(params, everything.astype(np.float64), complete=True)
        assert floor is not None
    return floor


def _floor_among(params: SamplingParams, values: npt.NDArray[np.float64], complete: bool) -> float | None:
    """Return the cut within ``values`` (log-probabilities, highest first); None when it is below an incomplete list."""
    floor = -math.inf
    if values.size == 0:
        return None
    if params.min_p > 0.0:
        floor = float(values[0]) + math.log(params.min_p)
        if floor < _HEAD_FLOOR and not complete:
            return None
        values = values[: int(np.searchsorted(-values, -floor, side="right"))]
        complete = True
    if 0 < params.top_k <= values.size:
        floor = float(values[params.top_k - 1])
        values = values[: params.top_k]
        complete = True
    elif params.top_k and not complete:
        return None
    if params.top_p < 1.0:
        masses = np.exp(values).cumsum()
        wanted = params.top_p * (masses[-1] if complete else 1.0)
        last = int(np.searchsorted(masses, wanted))
        if last == values.size and not complete:
            return None
        floor = max(floor, float(values[min(last, values.size - 1)]))
    return floor
