"""What the router has seen of answers and hand-overs, for its predictions. Pure: equal events give equal bits."""

from typing import Final

from disagg.scheduling.dispatch.workload_report import HandedOver

_PRIOR_ANSWER_TOKENS: Final = 128.0
_PRIOR_WEIGHT: Final = 4
_MEMORY: Final = 64
"""Answers and hand-overs that count."""
_FORGOTTEN: Final = 8 * _MEMORY
"""So many hand-overs later, nothing is left of one."""
_PRIOR_HAND_OVER_S: Final = 2e-3


class Experience:
    """Running means over what has ended."""

    def __init__(self) -> None:
        self.answer_tokens = _PRIOR_ANSWER_TOKENS
        """Mean length of an answer."""
        self.gaps_inverse = 1 / _PRIOR_ANSWER_TOKENS
        """Mean of one over the number of gaps between an answer's tokens."""
        self._num_answers = self._num_with_gaps = _PRIOR_WEIGHT
        self._hand_over_tokens = 0.0
        self._hand_over_s = _PRIOR_HAND_OVER_S
        self._num_hand_overs = 1.0
        self.handed_over = HandedOver()
        """Hand-overs since the beginning."""
        # Of hand-overs over measured links: what they took, and ought to have taken.
        self._link_taken_s = self._link_s = _PRIOR_HAND_OVER_S

    def answer_ended(self, num_tokens: int) -> None:
        """Note the length of an answer that came to its end."""
        self._num_answers = min(self._num_answers + 1, _MEMORY)
        self.answer_tokens += (num_tokens - self.answer_tokens) / self._num_answers
        if num_tokens > 1:
            self._num_with_gaps = min(self._num_with_gaps + 1, _MEMORY)
            self.gaps_inverse += (1 / (num_tokens - 1) - self.gaps_inverse) / self._num_with_gaps

    def hand_over_ended(self, num_tokens: int, duration_s: float, link_s: float | None = None) -> None:
        """Note how long KV blocks of so many tokens travelled, and how long by what was measured of their link."""
        if link_s is not None:
            share = 1 / _MEMORY
            self._link_taken_s += share * (duration_s - self._link_taken_s)
            self._link_s += share * (link_s - self._link_s)
        count, tokens, seconds = self.handed_over.count, self.handed_over.num_tokens, self.handed_over.duration_s
        self.handed_over = HandedOver(count + 1, tokens + num_tokens, seconds + duration_s)
        self._note_hand_over(num_tokens, duration_s)

    def others_handed_over(self, news: HandedOver) -> None:
        """Note hand-overs of other routers; of how they differ, nothing is known."""
        for _ in range(min(news.count, _FORGOTTEN)):
            self._note_hand_over(news.num_tokens / news.count, news.duration_s / news.count)

    def _note_hand_over(self, num_tokens: float, duration_s: float) -> None:
        kept = 1 - 1 / _MEMORY
        self._num_hand_overs = kept * self._num_hand_overs + 1
        self._hand_over_tokens = kept * self._hand_over_tokens + num_tokens
        self._hand_over_s = kept * self._hand_over_s + duration_s

    def hand_over_s(self, num_tokens: int, link_s: float | None = None) -> float:
        """Return the seconds that KV blocks are expected to travel.

        Over a link that was measured, as it says, and as far off as hand-overs were from that. Elsewhere half the mean,
        whatever their number of tokens.
        """
        if link_s is not None:
            return link_s * self._link_taken_s / self._link_s
        mean_s = self._hand_over_s / self._num_hand_overs
        mean_tokens = self._hand_over_tokens / self._num_hand_overs
        return mean_s * (0.5 + 0.5 * num_tokens / mean_tokens) if mean_tokens else mean_s
