"""Grammars over a model's tokens: which may come next. They are llguidance's: Lark, with JSON schemas and regexes."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

import llguidance

from disagg.base.errors import InvalidRequestError
from disagg.models.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES: Final = 256 * 1024
_MAX_WORDS: Final = 400
_MAX_KEPT: Final = 64
"""Compiled grammars that are kept: a copy begins with what the others have found out, in a tenth of the time."""
_LIMITS: Final = llguidance.LLParserLimits(
    max_items_in_row=2000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    verbose_errors=False,
)
"""What one grammar may cost: some 20 ms to compile, as much for one token, 200 MB of memory."""


def grammar_fault(grammar: str) -> str:
    """Return why ``grammar`` cannot be used, "" if it can. Without a vocabulary: control tokens in it are not checked.

    Takes some milliseconds: what may take longer is bounded by the limits above.
    """
    if len(grammar.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
        return f"it has more than {MAX_GRAMMAR_BYTES} bytes: make it smaller"
    is_error, words = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, limits=_LIMITS)
    return _words(words[0]) if is_error else ""


class GrammarCompiler:
    """Compiles grammars for one vocabulary. Safe to share between threads.

    ``vocab_size`` is that of the model, which may be wider than the tokenizer's: nothing allows the ids between.
    ``eos_token_ids`` end a text where the grammar lets it end.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        self._lock = threading.Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Do now what the first grammar would wait for. Raises InvalidRequestError where no token ends an answer."""
        with self._lock:
            self._made_vocabulary()

    def compile(self, grammar: str) -> llguidance.LLMatcher:
        """Return a matcher at the grammar's start. Raises InvalidRequestError for what is no grammar, or too large."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is None:
                kept = llguidance.LLMatcher(self._made_vocabulary(), grammar, limits=_LIMITS, log_level=0)
                if kept.is_error():
                    raise InvalidRequestError(_words(kept.get_error()))
                self._kept[grammar] = kept
                if len(self._kept) > _MAX_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(grammar)
            return kept.deep_copy()

    def _made_vocabulary(self) -> llguidance.LLTokenizer:
        """Return the tokens as llguidance knows them; to make that takes some 0.15 s for each 50,000.

        For most of it no other thread runs any Python.
        """
        if self._vocabulary is None:
            if not self._eos_token_ids:
                raise InvalidRequestError("this model has no token that ends an answer, which a grammar needs")
            vocabulary = _Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids[0])
            wrapper = llguidance.TokenizerWrapper(vocabulary)
            self._vocabulary = llguidance.LLTokenizer(wrapper, eos_token=self._eos_token_ids)
        return self._vocabulary


class _Vocabulary:
    """A tokenizer as ``llguidance.TokenizerWrapper`` wants it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        num_tokens = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(num_tokens)]
        self.tokens += [b""] * (vocab_size - num_tokens)  # which nothing allows
        self.special_token_ids = sorted(token_id for token_id in tokenizer.special_ids if token_id < num_tokens)

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_special_tokens=False)


def _words(error: str) -> str:
    """Return llguidance's words in one line, cut short where they repeat a long grammar."""
    words = "; ".join(line.strip() for line in error.splitlines() if line.strip())
    return words if len(words) <= _MAX_WORDS else f"{words[:_MAX_WORDS]}..."
