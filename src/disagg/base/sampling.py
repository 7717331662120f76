"""How the next token of one sequence is chosen and when the sequence ends.

The names and meanings are OpenAI's, and vLLM's where OpenAI has none. Stop *strings* are not here: they need
text, and are decided where text exists (``serve/api``).
"""

import enum

import msgspec


class FinishReason(enum.Enum):
    """Why a sequence ended. ``STOP`` and ``LENGTH`` are what the client sees as ``finish_reason``."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling settings of one sequence, already validated and complete.

    ``seed`` is always set (drawn by the API when the client gave none): noise is a function of (seed, position),
    so that a moved or resumed sequence continues identically.

    ``logprobs`` is the number of most likely alternatives to report beside the sampled token; ``None`` reports
    nothing, 0 the sampled token alone. ``prompt_logprobs`` likewise for the prompt's own tokens.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be sampled before this many output tokens."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""
    """Grammar, in llguidance's form, of which the answer is a text; empty allows every text."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that may be chosen; empty allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that may not come up in the answer."""

    @property
    def truncates(self) -> bool:
        """True when unlikely tokens are cut off before one is drawn."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken and no noise is drawn."""
        return self.temperature == 0.0

    @property
    def penalizes(self) -> bool:
        """True when tokens that were seen before are less likely."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def takes_most_likely(self) -> bool:
        """True when each token is the most likely one of the model's own logits, and nothing is told of others."""
        return (
            self.greedy
            and not self.penalizes
            and not (self.logit_bias or self.allowed_token_ids or self.bad_words or self.min_tokens or self.grammar)
            and self.logprobs is None
            and self.prompt_logprobs is None
        )


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probability of one token, with its rank among the vocabulary (1 is the most likely)."""

    token_id: int
    logprob: float
    rank: int


class PositionLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The token at one position and the most likely alternatives there, best first.

    Probabilities are those of the raw logits, before penalties, temperature and truncation, as in vLLM's default
    ``raw_logprobs`` mode.
    """

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
