"""What was predicted of a sequence beside what came of it, for logs and metrics. Pure."""

from disagg.scheduling.dispatch.actions import PathChosen, PathEnded
from disagg.scheduling.dispatch.state import SequenceEntry


def path_chosen(sequence: SequenceEntry, now: float) -> PathChosen:
    """Return the account of a choice that was just made by predictions."""
    assert sequence.chosen is not None, "predictions decided"
    return PathChosen(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        chosen=sequence.chosen,
        other=sequence.other,
        waited_s=now - sequence.arrived_s,
    )


def path_ended(sequence: SequenceEntry) -> PathEnded | None:
    """Return the account of a sequence that has its last token; None where no prediction decided or a death did."""
    chosen, other = sequence.chosen, sequence.other
    if chosen is None or sequence.losses or not sequence.num_answer_tokens:
        return None
    ttft_s = sequence.first_token_s - sequence.arrived_s
    waited_s = sequence.started_s - sequence.arrived_s
    tpot_s = sequence.tpot_s
    return PathEnded(
        request_id=sequence.request_id,
        epoch=sequence.epoch,
        path=chosen.path,
        follows_roles=chosen.follows_roles,
        num_prompt_tokens=sequence.num_tokens - sequence.num_answer_tokens,
        predicted_ttft_s=waited_s + chosen.ttft_s,
        ttft_s=ttft_s,
        predicted_tpot_s=chosen.tpot_s,
        tpot_s=tpot_s,
        predicted_hand_over_s=chosen.hand_over_s,
        hand_over_s=sequence.hand_over_s,
        ttft_regret_s=None if other is None else ttft_s - waited_s - other.ttft_s,
        tpot_regret_s=None if other is None or tpot_s is None else tpot_s - other.tpot_s,
    )
