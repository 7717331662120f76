"""Which instance gets a sequence: the one with the least load of the kind that its role suffers from.

Prefill is compute-bound, so a prefill instance is judged by the tokens that it would have to prefill until the first
token: those given to it, and the sequence's own without what is cached. Decode is memory-bound, so a decode instance is
judged by the KV tokens it would hold, and by the link over which it would read a prompt's blocks, where links were
measured: a near one is preferred to one that holds somewhat less. A colocated instance has both loads. Loads are
compared between paths as sums of tokens. Ties go to the instance configured first, so equal logs give equal choices.

A later turn of a conversation goes straight to the decode instance that holds it, where the new tokens cost less there
than on a prefill instance: see ``prefixes``.

A sequence that goes on elsewhere need not wait for a prefill instance: where none can take it now, a decode instance
computes it again, from its known tokens on.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Final, NamedTuple

from disagg.base.config import RouterSettings
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.capacity import most_tokens, serves_requests
from disagg.scheduling.dispatch.actions import FailReason
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.load_index import LoadIndex
from disagg.scheduling.dispatch.prefixes import (
    choose_append,
    hand_over_cost,
    held_by,
    lenders,
    num_to_compute,
    start_cost,
)
from disagg.scheduling.dispatch.state import InstanceEntry, InstanceState, SequenceEntry

NEAR_SPEED: Final = 2.0
"""So many times as quickly one that is near must be reached as the one that holds the least."""
NEAR_LOAD: Final = 2.0
"""So many times as many KV tokens one that is near may hold: nearness does not outweigh load."""
_PREFILL: Final = Role.PREFILL  # looked up for every instance that is looked at
_FAR_S: Final = 0.01
"""Seconds for which KV blocks travel from where it begins to matter."""


def choose_start(
    fleet: Fleet, sequence: SequenceEntry, *, append_turns: bool = False, but: Collection[InstanceId] = ()
) -> InstanceEntry | None:
    """Return the live instance on which the sequence starts, or None when it has to wait; none of those in ``but``.

    A prefill instance is taken only when a decode instance can continue (or nothing is left to decode); one that is
    restarting counts, unless a live colocated instance offers a path without waiting. With ``append_turns`` a decode
    instance may start what it holds the beginning of.
    """
    holders = lenders(fleet, sequence, but)
    pair = _best_pair(fleet, sequence, holders, but)
    colocated = _best_colocated(fleet, sequence, holders, but)
    if pair is None and colocated is None:
        return choose_decode(fleet, sequence, but) if sequence.is_resumed else None
    if pair is None:
        return colocated
    if append_turns and sequence.held:
        holding = [one for one in held_by(fleet, sequence, but) if one in fleet.ready.to_decode]
        append = choose_append(sequence, (one for one in holding if _fits(one, sequence)))
        if append is not None and append[1] < pair.first_token_cost:
            return append[0]
    if colocated is None:
        return pair.prefill
    alone = start_cost(holders, sequence, colocated) + colocated.kv_tokens
    return colocated if pair.must_wait or alone < pair.cost else pair.prefill


def choose_decode(fleet: Fleet, sequence: SequenceEntry, but: Collection[InstanceId] = ()) -> InstanceEntry | None:
    """Return the live decode instance that adopts the sequence, or None when it has to wait; none of ``but``."""
    return _least_held(fleet, fleet.ready.to_decode, sequence, but)


def choose_adopter(fleet: Fleet, sequence: SequenceEntry) -> InstanceEntry | None:
    """Return the live instance that adopts an offered sequence, or None when it has to wait.

    Where no decode instance can, a colocated one does. One that held the sequence in this attempt cannot.
    """
    least, near = compared_to_adopt(fleet, sequence)
    if least is None or near is None:
        return least
    num_tokens = sequence.num_tokens
    return near if near.kv_tokens + num_tokens <= NEAR_LOAD * (least.kv_tokens + num_tokens) else least


def compared_to_adopt(
    fleet: Fleet, sequence: SequenceEntry
) -> tuple[InstanceEntry, InstanceEntry | None] | tuple[None, None]:
    """Return who holds the least of those that could adopt a sequence, and of those that are much nearer, if any."""
    but = sequence.visited
    least = choose_decode(fleet, sequence, but)
    if least is None:
        least = _least_held(fleet, fleet.ready.to_go_on, sequence, but)
        return (None, None) if least is None else (least, None)
    travel_s = _travel_s(sequence, least)
    if travel_s is None or travel_s < _FAR_S:
        return least, None
    most_s = travel_s / NEAR_SPEED

    def is_near(entry: InstanceEntry) -> bool:
        its_s = _travel_s(sequence, entry)
        return its_s is not None and its_s <= most_s and entry.instance not in but and _fits(entry, sequence)

    return least, fleet.ready.to_decode.first(is_near)


def matters_who_decodes(fleet: Fleet, *, has_prefix: bool) -> bool:
    """Return False where a sequence starts on the same instance whoever will go on with it."""
    return has_prefix or len(fleet.ready.to_do_both) > 0


def compared_to_start(fleet: Fleet, sequence: SequenceEntry) -> list[InstanceEntry]:
    """Return whose KV tokens decide where a sequence starts: were those of others higher, nothing would change."""
    if not matters_who_decodes(fleet, has_prefix=bool(sequence.held)):
        return []
    compared = (choose_decode(fleet, sequence), _best_colocated(fleet, sequence, lenders(fleet, sequence), ()))
    return [entry for entry in compared if entry is not None]


def can_be_served(fleet: Fleet, sequence: SequenceEntry, *, strict_roles: bool = True) -> bool:
    """True when instances that are ready or will be could serve the sequence in its state.

    Their size is not looked at: see ``can_be_held``.
    """
    present = fleet.ready.roles_to_come
    if sequence.lease is not None:
        return not present.isdisjoint((Role.DECODE, Role.COLOCATED))
    return serves_requests(present, strict_roles=strict_roles) or (sequence.is_resumed and Role.DECODE in present)


def can_be_held(instances: Sequence[InstanceEntry], sequence: SequenceEntry, *, strict_roles: bool = True) -> bool:
    """True unless all instances that could serve the sequence in its state are known to be too small for it."""
    if sequence.lease is None and not strict_roles:
        return any(entry.can_hold(sequence.max_total_tokens) for entry in instances if entry.will_take)
    holds = {
        role: any(_fits(entry, sequence) for entry in instances if entry.role is role and entry.will_take)
        for role in Role
    }
    if sequence.lease is not None:
        return holds[Role.DECODE] or holds[Role.COLOCATED]
    pair = holds[Role.PREFILL] and (holds[Role.DECODE] or sequence.ends_at_first_token)
    return pair or holds[Role.COLOCATED] or (sequence.is_resumed and holds[Role.DECODE])


def why_unplaceable(fleet: Fleet, sequence: SequenceEntry, *, strict_roles: bool) -> tuple[FailReason, str] | None:
    """Return why a sequence that no instance can take now need not wait for one; None where it may."""
    if not can_be_served(fleet, sequence, strict_roles=strict_roles):
        return FailReason.UNAVAILABLE, f"no instances are left that could serve the request ({fleet.describe()})"
    if not can_be_held(fleet.entries, sequence, strict_roles=strict_roles):
        return FailReason.TOO_LONG, (
            f"the request needs up to {sequence.max_total_tokens} tokens with its answer, more than the instances "
            f"can hold ({fleet.describe()}); ask for fewer tokens or raise --kv-memory"
        )
    return None


def why_over(
    fleet: Fleet, sequence: SequenceEntry, settings: RouterSettings, now: float
) -> tuple[FailReason, str] | None:
    """Return why a sequence's time is over, of its own or to wait for an instance; None where it is not."""
    if now >= sequence.deadline_s:
        words = f"did not finish within {settings.request_timeout_s:g} s (--request-timeout-s)"
        return FailReason.TIMEOUT, f"the request {words}"
    if now >= sequence.wait_until_s:
        words = f"for {settings.instance_wait_s:g} s ({fleet.describe()})"
        return FailReason.UNAVAILABLE, f"no instance could take the request {words}"
    return None


class _Pair(NamedTuple):
    """A prefill instance and what comes after it, with the tokens to be computed until the first token, and in all.

    ``must_wait``: the decode instance is still to come up.
    """

    prefill: InstanceEntry
    first_token_cost: float
    cost: float
    must_wait: bool = False


def _best_pair(
    fleet: Fleet, sequence: SequenceEntry, holders: Sequence[InstanceEntry], but: Collection[InstanceId]
) -> _Pair | None:
    def load(entry: InstanceEntry) -> tuple[float, int]:
        return start_cost(holders, sequence, entry), entry.kv_tokens

    prefill = _least(fleet, fleet.ready.to_prefill, sequence, but, load)
    if prefill is None:
        return None
    cost = start_cost(holders, sequence, prefill)
    if sequence.ends_at_first_token:
        return _Pair(prefill, cost, cost)
    decode = choose_decode(fleet, sequence, but)
    if decode is not None:
        travel = hand_over_cost(sequence, decode)
        return _Pair(prefill, cost + travel, cost + decode.prefill_tokens + decode.kv_tokens)
    coming = any(
        entry.role is Role.DECODE and entry.is_coming and entry.instance not in but and _fits(entry, sequence)
        for entry in fleet.entries
    )
    return _Pair(prefill, cost, cost, must_wait=True) if coming else None


def _best_colocated(
    fleet: Fleet, sequence: SequenceEntry, holders: Sequence[InstanceEntry], but: Collection[InstanceId]
) -> InstanceEntry | None:
    def load(entry: InstanceEntry) -> tuple[float, int]:
        return start_cost(holders, sequence, entry) + entry.kv_tokens, entry.kv_tokens

    return _least(fleet, fleet.ready.to_do_both, sequence, but, load)


def _least_held(
    fleet: Fleet, index: LoadIndex, sequence: SequenceEntry, but: Collection[InstanceId]
) -> InstanceEntry | None:
    def load(entry: InstanceEntry) -> tuple[float, int]:
        return entry.kv_tokens + num_to_compute(sequence, entry), entry.prefill_tokens

    return _least(fleet, index, sequence, but, load)


def _least(
    fleet: Fleet,
    index: LoadIndex,
    sequence: SequenceEntry,
    but: Collection[InstanceId],
    load: Callable[[InstanceEntry], tuple[float, int]],
) -> InstanceEntry | None:
    """Return the instance that can hold the sequence and would have the least load with it.

    The sequence is the same load for all that hold nothing of it, so the first of those in the index is the best of
    them. The others are looked at one by one.
    """
    if not len(index):
        return None
    held, needed = sequence.held, _needed(index.role, sequence)
    if not held:
        return index.first(lambda entry: entry.can_hold(needed) and entry.instance not in but)
    holders = [entry for entry in held_by(fleet, sequence) if entry in index]
    first = None
    if len(holders) < len(index):
        first = index.first(
            lambda entry: entry.can_hold(needed) and entry.instance not in but and entry.instance not in held
        )
    if not holders:
        return first
    candidates = [entry for entry in holders if entry.can_hold(needed) and entry.instance not in but]
    if first is not None:
        candidates.append(first)
    return min(candidates, key=lambda entry: (*load(entry), entry.order), default=None)


def open_to(
    instances: Iterable[InstanceEntry], sequence: SequenceEntry, role: Role, *, hand_over: bool
) -> list[InstanceEntry]:
    """Return the ready instances of a role that can hold the sequence, with ``hand_over`` up to its first token."""
    needed = most_tokens(sequence.num_tokens, sequence.max_total_tokens, hand_over=hand_over)
    return [
        entry
        for entry in instances
        if entry.role is role and entry.state is InstanceState.READY and entry.can_hold(needed)
    ]


def _travel_s(sequence: SequenceEntry, entry: InstanceEntry) -> float | None:
    """Return how long what an instance lacks of a sequence's KV takes to get there; None where that is not known."""
    source = sequence.kv_source
    link = None if source is None else entry.reads.get(source)
    return None if link is None else link.transfer_time_s(num_to_compute(sequence, entry))


def _fits(entry: InstanceEntry, sequence: SequenceEntry) -> bool:
    return entry.can_hold(_needed(entry.role, sequence))


def _needed(role: Role, sequence: SequenceEntry) -> int:
    return most_tokens(sequence.num_tokens, sequence.max_total_tokens, hand_over=role is _PREFILL)
