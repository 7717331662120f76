"""Which answers move to another instance while they run, and how. Pure.

A draining instance gives away all that runs on it; one that becomes a prefill instance, what it decodes then. The
source offers the KV blocks after its next token, and the other one pulls them, as after a prefill (Llumnix calls it
live migration). An answer stays where it is while no other instance can take it.
"""

import enum
from collections.abc import Collection, Iterable

from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.actions import AnyDispatchAction, Drained, SendAbort, SendMigrate
from disagg.scheduling.dispatch.choice import choose_adopter, choose_start
from disagg.scheduling.dispatch.fleet import Fleet
from disagg.scheduling.dispatch.fleet_facts import known_prefill_costs
from disagg.scheduling.dispatch.forecaster import Forecaster
from disagg.scheduling.dispatch.state import InstanceEntry, SequenceEntry, Whereabouts

_MOVABLE = (Whereabouts.DECODING, Whereabouts.RUNNING)


class Move(enum.Enum):
    """How an answer comes to another instance."""

    PULL = "pull"
    """Its KV blocks are offered and pulled: it goes on after its next token."""
    RECOMPUTE = "recompute"
    """It starts again, in a new attempt, from its known tokens."""


def movable(
    fleet: Fleet, sequences: Iterable[SequenceEntry], flipped: InstanceEntry | None = None
) -> list[SequenceEntry]:
    """Return the running sequences that their instances give away, in the order of arrival.

    ``flipped`` has another role since this moment.
    """
    sources: Collection[InstanceId] = fleet.draining
    if flipped is not None and flipped.role is Role.PREFILL:
        sources = {*sources, flipped.instance}
    if not sources:
        return []
    return [sequence for sequence in sequences if sequence.holder in sources and sequence.state in _MOVABLE]


def choose_move(fleet: Fleet, sequence: SequenceEntry, forecaster: Forecaster) -> Move | None:
    """Return how a running sequence moves now; None while no other instance can go on with it.

    To pull costs a copy over the link, to compute again a prefill of prompt and answer without what is cached there:
    the one that is predicted to be quicker. A way through a prefill instance would end with the same copy, so it is
    taken only where nobody can adopt. Where nobody knows yet what prefill costs, blocks are pulled.
    """
    assert sequence.holder is not None, "a running sequence is somewhere"
    adopter = choose_adopter(fleet, sequence)  # its holder is one of those that it has visited
    target = choose_start(fleet, sequence, but=(sequence.holder,))
    is_decided = target is not None and (target.role is not Role.PREFILL or sequence.ends_at_first_token)
    if adopter is None:
        return Move.RECOMPUTE if is_decided else None
    if target is None or not is_decided or known_prefill_costs(fleet.entries) is None:
        return Move.PULL
    pull_s = forecaster.hand_over_s(sequence, sequence.holder, adopter)
    num_to_compute = sequence.num_tokens - sequence.num_cached(target.instance)
    recompute_s = forecaster.first_token_s(target, sequence, num_to_compute)
    return Move.RECOMPUTE if recompute_s < pull_s else Move.PULL


def is_only_with_visited(fleet: Fleet, sequence: SequenceEntry) -> bool:
    """Return whether an offered sequence could be adopted but for having been on the instances that would."""
    return any(
        entry.instance in sequence.visited and entry.role is not Role.PREFILL and entry.will_take
        for entry in fleet.entries
    )


def migrate(sequence: SequenceEntry, source: InstanceId, now: float) -> SendMigrate:
    """Let the source offer a running sequence, after its next token."""
    sequence.move(Whereabouts.MIGRATING, now, f"{source} gives it away")
    return SendMigrate(request_id=sequence.request_id, epoch=sequence.epoch, instance=source)


def send_reader_away(fleet: Fleet, sequence: SequenceEntry, now: float) -> list[AnyDispatchAction]:
    """Return what ends the early reading of a sequence, if an instance does: another one goes on, or nobody."""
    reader, sequence.reader = sequence.reader, None
    if reader is None:
        return []
    sequence.visited.add(reader)  # it remembers that this attempt ended there
    abort = SendAbort(request_id=sequence.request_id, epoch=sequence.epoch, instance=reader)
    return [abort, Drained(instance=reader)] if fleet.discharge(sequence, reader, now) else [abort]
