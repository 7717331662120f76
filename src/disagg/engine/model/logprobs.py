"""Log-probabilities of raw logits, with ranks: what OpenAI's ``logprobs`` and vLLM's ``prompt_logprobs`` report."""

from collections.abc import Sequence

import torch

from disagg.base.sampling import PositionLogprobs, TokenLogprob


def position_logprobs(
    logits: torch.Tensor, token_ids: Sequence[int], nums_top: Sequence[int]
) -> list[PositionLogprobs | None]:
    """Return, for each row of ``logits`` [N, vocab], the given token and the ``nums_top`` most likely ones.

    Ranks count the tokens that are strictly more likely, plus one. None for a row that is no distribution, since it
    holds NaN or infinity or forbids every token.
    """
    chosen_ids = torch.as_tensor(token_ids, device=logits.device).unsqueeze(1)
    normalizers = logits.logsumexp(dim=-1, keepdim=True)
    is_finite = normalizers.squeeze(1).isfinite().tolist()
    chosen_logits = logits.gather(1, chosen_ids)
    ranks = ((logits > chosen_logits).sum(dim=-1) + 1).tolist()
    chosen = (chosen_logits - normalizers).squeeze(1).tolist()
    widest = min(max(nums_top, default=0), logits.shape[1])
    values, ids = logits.topk(widest, dim=-1)
    top_logprobs, top_ids = (values - normalizers).tolist(), ids.tolist()
    return [
        PositionLogprobs(
            chosen=TokenLogprob(token_id, chosen[row], ranks[row]),
            top=tuple(
                TokenLogprob(top_ids[row][place], top_logprobs[row][place], place + 1)
                for place in range(min(num_top, widest))
            ),
        )
        if is_finite[row]
        else None
        for row, (token_id, num_top) in enumerate(zip(token_ids, nums_top, strict=True))
    ]
