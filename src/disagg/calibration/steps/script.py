"""What a profiled instance is asked to compute, and what comes of it: the words between the two processes."""

import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import Final

import msgspec

from disagg.base.messages import InstanceFacts

_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_SHORTEST_CONTEXT: Final = 16
_LONGEST_CONTEXT: Final = 8192
_LONGEST_PROMPT: Final = 4096
_POOL_SHARE: Final = 0.8
"""How much of the KV pool a script may fill: with more, sequences would be preempted."""
_DISTURBED: Final = 0.02
"""A repetition that had its core for less of the time than the best one, by this much, does not count."""
_MAX_OUTPUT: Final = 512
"""Tokens that each decode may become longer; the scripts end long before."""


class Script(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Decodes that are handed over with these contexts and run alone for some steps, then prompts beside them.

    The scheduler cuts the prompts into chunks and packs them as it does in service. An ``is_endless`` script goes on
    until it is told to stop: its decodes decode, or, where there are none, its prompts come again and again. Decodes
    and prompts together must have places in one step.
    """

    decode_contexts: tuple[int, ...] = ()
    prompt_lens: tuple[int, ...] = ()
    num_decode_steps: int = 4
    is_endless: bool = False
    temperature: float = 0.0
    """That of all its sequences: above 0 costs two more passes over the vocabulary."""


class RunScript(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Play this script. An endless one is answered when it has begun, the others when they have ended."""

    script: Script


class StopScript(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """End an endless script."""


Command = RunScript | StopScript


class MeasuredStep(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of the loop with its step: chunks as (tokens already there, new tokens), and its seconds.

    ``on_core`` is the part of them in which the loop's thread computed: less than 1 where other processes took its
    core, or where it waited for a device.
    """

    chunks: tuple[tuple[int, int], ...]
    time_s: float
    on_core: float = 1.0

    @property
    def is_decode(self) -> bool:
        """True when every chunk is one token."""
        return all(num_tokens == 1 for _, num_tokens in self.chunks)


class ScriptResult(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What a script brought: steps of the full decode batch alone, then those with prompts, each in order."""

    decode_steps: tuple[MeasuredStep, ...] = ()
    prefill_steps: tuple[MeasuredStep, ...] = ()


class InstanceReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The instance takes scripts."""

    facts: InstanceFacts


Report = InstanceReady | ScriptResult


class ScriptLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What an instance can be asked: tokens of its KV pool, of one sequence, and sequences of one step."""

    capacity_tokens: int
    max_model_len: int
    max_batch_size: int
    block_size: int


def standard_scripts(
    limits: ScriptLimits, seed: int, quick: bool = False, temperature: float = 0.0
) -> tuple[Script, ...]:
    """Draw scripts over batch size, contexts, prompts alone, chunks beside decodes, several prompts in a step.

    Lengths are drawn evenly over their logarithm, so that short and long are equally well known.
    """
    rng = random.Random(seed)
    sizes = [
        size
        for size in _BATCH_SIZES
        if size <= limits.max_batch_size and 4 * size * limits.block_size <= limits.capacity_tokens * _POOL_SHARE / 2
    ]
    scripts = [
        Script(
            decode_contexts=_contexts(limits, size, (part + rng.random()) / num_parts, rng),
            prompt_lens=_prompts(limits, rng, reserved=1 / 2)[: limits.max_batch_size - size],
            temperature=temperature,
        )
        for num_parts in (1 if quick else 4,)
        for size in sizes
        for part in range(num_parts)
    ]
    scripts += [
        Script(prompt_lens=_prompts(limits, rng, reserved=0), temperature=temperature)
        for _ in range(8 if quick else 24)
    ]
    return tuple(scripts)


def neighbour_scripts(limits: ScriptLimits) -> dict[str, Script]:
    """Return what a neighbouring instance computes without end, by the name of its activity."""
    size = min(16, limits.max_batch_size)
    context = _bounded(512, limits, share=0.5 / size)
    prompt_len = _bounded(512, limits, share=_POOL_SHARE)
    return {
        "prefill": Script(prompt_lens=(prompt_len,), is_endless=True),
        "decode": Script(decode_contexts=(context,) * size, is_endless=True),
    }


def _contexts(limits: ScriptLimits, size: int, position: float, rng: random.Random) -> tuple[int, ...]:
    """Return contexts around one length; ``position`` from 0 to 1 says where in the range of lengths that lies."""
    longest = min(_LONGEST_CONTEXT, _bounded(_LONGEST_CONTEXT, limits, share=_POOL_SHARE / 2 / size) * 2 // 3)
    shortest = min(_SHORTEST_CONTEXT, longest)
    length = math.exp(math.log(shortest) + position * math.log(longest / shortest))
    return tuple(max(1, round(length * rng.uniform(0.5, 1.5))) for _ in range(size))


def _prompts(limits: ScriptLimits, rng: random.Random, reserved: float) -> tuple[int, ...]:
    """Return one prompt of any length, or several short ones."""
    longest = _bounded(_LONGEST_PROMPT, limits, share=_POOL_SHARE * (1 - reserved))
    if rng.random() < 0.6:
        return (_log_uniform(rng, 2, longest),)
    num_prompts = min(rng.randint(2, 8), limits.max_batch_size)
    return tuple(_log_uniform(rng, 2, max(2, longest // 32)) for _ in range(num_prompts))


def _bounded(length: int, limits: ScriptLimits, share: float) -> int:
    """Return at most ``length``: a sequence that takes no more than a share of the pool and leaves room to grow.

    The last block of a sequence is partly empty, and as much again is kept for what it generates.
    """
    room = int(limits.capacity_tokens * share) - 2 * limits.block_size
    return max(2, min(length, room, limits.max_model_len * 3 // 4))


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(max(low, high)))))


def max_output(context: int, max_model_len: int) -> int:
    """Return how many tokens a decode may generate behind ``context``."""
    return max(2, min(_MAX_OUTPUT, max_model_len - context))


def joined_steps(results: Sequence[ScriptResult]) -> list[MeasuredStep]:
    """Join the repetitions of one script: the decode batch as one sample, each step with prompts as one.

    A step with prompts is the same in every repetition but for the few tokens that the decodes had come further.
    """
    samples = []
    decodes = [step for result in results for step in result.decode_steps]
    if decodes:
        samples.append(_calm(decodes))
    for index in range(min(len(result.prefill_steps) for result in results)):
        same = [result.prefill_steps[index] for result in results]
        samples.append(_calm(same))
    return samples


def _calm(steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """Return the median by time of those that had their core, with their mean time: what a queue has to wait."""
    most_on_core = max(step.on_core for step in steps)
    undisturbed = [step for step in steps if step.on_core >= most_on_core - _DISTURBED]
    middle = sorted(undisturbed, key=lambda step: step.time_s)[(len(undisturbed) - 1) // 2]
    return msgspec.structs.replace(middle, time_s=fmean(step.time_s for step in undisturbed))
