"""Which instance gets a sequence: the one with the least load of the kind that its role suffers from.

Prefill is compute-bound, so a prefill instance is judged by the tokens it still has to prefill; decode is
memory-bound, so a decode instance is judged by the KV tokens it holds. A colocated instance has both loads. Loads are
compared between paths as sums of tokens. Ties go to the instance configured first, so equal logs give equal choices.

A sequence that goes on elsewhere need not wait for a prefill instance: where none can take it now, a decode instance
computes it again, from its known tokens on.
"""

from collections.abc import Iterable, Sequence

from disagg.base.request import Role
from disagg.scheduling.capacity import most_tokens, serves_requests
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState, SequenceEntry


def choose_start(instances: Sequence[InstanceEntry], sequence: SequenceEntry) -> InstanceEntry | None:
    """Return the live instance on which the sequence starts, or None when it has to wait.

    A prefill instance is taken only when a decode instance can continue (or nothing is left to decode); one that is
    restarting counts, unless a live colocated instance offers a path without waiting.
    """
    pair = _best_pair(instances, sequence)
    colocated = _least_loaded(_fitting(instances, Role.COLOCATED, sequence))
    if pair is None and colocated is None:
        return choose_decode(instances, sequence) if sequence.is_resumed else None
    if pair is None or colocated is None:
        return colocated if pair is None else pair[0]
    prefill, decode_load = pair
    if decode_load is None or _load(colocated) < _load(prefill) + decode_load:
        return colocated
    return prefill


def choose_decode(instances: Iterable[InstanceEntry], sequence: SequenceEntry) -> InstanceEntry | None:
    """Return the live decode instance that goes on with the sequence, or None when it has to wait."""
    return _least_loaded(_fitting(instances, Role.DECODE, sequence))


def choose_adopter(instances: Iterable[InstanceEntry], sequence: SequenceEntry) -> InstanceEntry | None:
    """Return the live instance that adopts an offered sequence, or None when it has to wait.

    Where no decode instance can, a colocated one does. One that held the sequence in this attempt cannot.
    """
    others = [entry for entry in instances if entry.instance not in sequence.visited]
    return choose_decode(others, sequence) or _least_loaded(_fitting(others, Role.COLOCATED, sequence))


def can_be_served(instances: Sequence[InstanceEntry], sequence: SequenceEntry) -> bool:
    """True when instances that are ready or will be could serve the sequence in its state.

    Their size is not looked at: see ``can_be_held``.
    """
    present = {entry.role for entry in instances if entry.will_take}
    if sequence.lease is not None:
        return not present.isdisjoint((Role.DECODE, Role.COLOCATED))
    return serves_requests(present) or (sequence.is_resumed and Role.DECODE in present)


def can_be_held(instances: Sequence[InstanceEntry], sequence: SequenceEntry) -> bool:
    """True unless all instances that could serve the sequence in its state are known to be too small for it."""
    holds = {
        role: any(
            entry.can_hold(_needed(role, sequence)) for entry in instances if entry.role is role and entry.will_take
        )
        for role in Role
    }
    if sequence.lease is not None:
        return holds[Role.DECODE] or holds[Role.COLOCATED]
    pair = holds[Role.PREFILL] and (holds[Role.DECODE] or sequence.ends_at_first_token)
    return pair or holds[Role.COLOCATED] or (sequence.is_resumed and holds[Role.DECODE])


def _best_pair(instances: Sequence[InstanceEntry], sequence: SequenceEntry) -> tuple[InstanceEntry, int | None] | None:
    """Return the best prefill instance and the load of the decode side, None where that is still to come up."""
    prefill = _least_loaded(_fitting(instances, Role.PREFILL, sequence))
    if prefill is None:
        return None
    if sequence.ends_at_first_token:
        return prefill, 0
    decode = choose_decode(instances, sequence)
    if decode is not None:
        return prefill, _load(decode)
    coming = any(
        entry.role is Role.DECODE and entry.is_coming and entry.can_hold(_needed(Role.DECODE, sequence))
        for entry in instances
    )
    return (prefill, None) if coming else None


def _fitting(instances: Iterable[InstanceEntry], role: Role, sequence: SequenceEntry) -> list[InstanceEntry]:
    needed = _needed(role, sequence)
    return [
        entry
        for entry in instances
        if entry.role is role and entry.state is InstanceState.READY and entry.can_hold(needed)
    ]


def _needed(role: Role, sequence: SequenceEntry) -> int:
    return most_tokens(sequence.num_tokens, sequence.max_total_tokens, hand_over=role is Role.PREFILL)


def _least_loaded(entries: list[InstanceEntry]) -> InstanceEntry | None:
    return min(entries, key=_order, default=None)


def _order(entry: InstanceEntry) -> tuple[int, int]:
    """Return the sort key: first the load that the role suffers from, then the other one."""
    if entry.role is Role.PREFILL:
        return (entry.prefill_tokens, entry.kv_tokens)
    if entry.role is Role.DECODE:
        return (entry.kv_tokens, entry.prefill_tokens)
    return (_load(entry), entry.kv_tokens)


def _load(entry: InstanceEntry) -> int:
    """Return the tokens that stand between a new sequence and its turn on this instance."""
    if entry.role is Role.PREFILL:
        return entry.prefill_tokens
    return entry.prefill_tokens + entry.kv_tokens
