"""From results to the router's messages."""

from collections.abc import Sequence

from disagg.base.errors import InternalError
from disagg.base.messages import Failed, Pulled, SequenceOutput
from disagg.base.sampling import FinishReason
from disagg.engine.executor import ChunkResult, Work
from disagg.engine.sequences import LiveSequence
from disagg.scheduling.step.actions import ReleaseLease
from disagg.transfer.link import TransferState


def accept_results(step: Sequence[Work], results: Sequence[ChunkResult], now: float) -> list[SequenceOutput]:
    """Add a step's tokens to their sequences; return the output of each chunk that sampled, in order.

    A sequence whose chunk failed has its ``failure`` set and no output.
    """
    outputs = []
    for work, result in zip(step, results, strict=True):
        if result.failure is not None:
            work.sequence.failure = result.failure
            continue
        if result.prompt_logprobs:
            work.sequence.add_prompt_logprobs(work.chunk.start + 1, result.prompt_logprobs)
        if result.token_id is not None:
            outputs.append(_accept(work.sequence, result, result.token_id, now))
    return outputs


def failed_message(sequence: LiveSequence) -> Failed:
    """Return what tells the router of a sequence that ended with its failure."""
    failure = sequence.failure
    if failure is None:
        raise InternalError(f"sequence {sequence.request_id} failed without a reason")
    return Failed(request_id=sequence.request_id, epoch=sequence.epoch, kind=failure.kind, message=failure.message)


def pulled_message(action: ReleaseLease, sequence: LiveSequence | None, now: float) -> Pulled:
    """Return what lets the source of an offer free its blocks: how the pull went, or why there will be none.

    ``sequence`` is None when a newer attempt has taken the place of the one that was offered.
    """
    result = sequence.pull if sequence is not None else None
    failure = _why_unread(sequence, now)
    succeeded = result is not None and not failure
    return Pulled(
        request_id=action.request_id,
        epoch=action.epoch,
        source=action.source,
        num_bytes=result.num_bytes if result is not None and succeeded else 0,
        duration_s=result.ended_s - result.started_s if result is not None else 0.0,
        failure=failure,
    )


def _why_unread(sequence: LiveSequence | None, now: float) -> str:
    """Return why the offered blocks were not (all) read; empty when they were, or when none was missing here."""
    if sequence is None or sequence.offer is None:
        return "a newer attempt has taken the sequence's place"
    if sequence.pull is not None and sequence.pull.state is not TransferState.DONE:
        return sequence.pull.failure
    if now >= sequence.offer.expires_s:
        return "the lease expired before the blocks were read"
    return sequence.abandoned if sequence.pull is None else ""


def _accept(sequence: LiveSequence, result: ChunkResult, token_id: int, now: float) -> SequenceOutput:
    reason = sequence.append(token_id)
    stamps, prompt_logprobs = sequence.first_output(now)
    return SequenceOutput(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        token_ids=(token_id,),
        finish_reason=reason,
        stop_token_id=token_id if reason is FinishReason.STOP else None,
        logprobs=(result.logprobs,) if result.logprobs is not None else (),
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=sequence.num_cached_tokens if stamps is not None else 0,
        stamps=stamps,
    )
