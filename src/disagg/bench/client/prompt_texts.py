"""Prompts of exact length in tokens, made of real text, that share what the workload says and nothing else.

A prompt is a row of words, each with the space before it. Tokenizers cut text before a space and a letter, so a word
has the same tokens wherever it stands, and lengths add up; the sum is checked on the whole text all the same.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.measure.trace_rows import UNREADABLE, numbered_lines, open_text
from disagg.measure.workload import NO_PREFIX, PrefixBlocks

_OPENING_WORDS: Final = 6
"""Words drawn one by one at a passage's start: two passages never begin alike, wherever in the text they are from."""
_COMMON_WORDS: Final = 3000
"""Distinct words among which those of a single token are looked for."""
_MIN_WORDS: Final = 100
_MAX_CORRECTIONS: Final = 16


class TextTokenizer(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text, with what the model wants around a prompt unless told otherwise."""


Encode = Callable[[str], Sequence[int]]
"""From a text to the ids of the prompt that the server makes of it: with special tokens, or within a chat template."""


@dataclass(frozen=True, slots=True)
class PromptText:
    """A prompt as text and as token ids. ``num_tokens`` is what the server will count."""

    text: str
    token_ids: Sequence[int]
    num_tokens: int


def english_text() -> str:
    """Return 460 kB of English that every CPython carries: the topics of its ``help()``."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def read_text(path: Path) -> str:
    """Return the text of a file: all of a ``.txt``, or each line's ``prompt`` (or first of ``turns``) of a ``.jsonl``.

    Either may be gzipped (``.gz``). Raises ConfigurationError when it cannot be read.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".txt", ".jsonl")):
        raise ConfigurationError(f"{path} holds no prompts: neither .txt nor .jsonl, nor one of them gzipped (.gz)")
    try:
        with open_text(path) as lines:
            return lines.read() if name.endswith(".txt") else "\n".join(_prompts(path, lines))
    except UNREADABLE as error:
        raise ConfigurationError(f"cannot read the prompts {path}: {error}") from error


class _PromptLine(msgspec.Struct):
    prompt: str | None = None
    turns: list[str] = []


def _prompts(path: Path, lines: Iterator[str]) -> Iterator[str]:
    decoder = msgspec.json.Decoder(_PromptLine)
    for number, line in numbered_lines(lines):
        try:
            row = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(f"{path}, line {number} has no prompt: {error}") from error
        text = row.prompt if row.prompt is not None else next(iter(row.turns), None)
        if text is None:
            raise ConfigurationError(f'{path}, line {number} has no "prompt"')
        yield text


class Words:
    """The words of a text in order, and how many tokens each has behind another."""

    def __init__(self, text: str, tokenizer: TextTokenizer) -> None:
        """Keep the words that begin with a letter; raise ConfigurationError for a text with too few of them."""
        self._words = [word for word in text.split() if word[0].isalpha()]
        self._tokenizer = tokenizer
        self._counts: dict[str, int] = {}
        if len(self._words) < _MIN_WORDS:
            raise ConfigurationError(f"{len(self._words)} words are too few to make prompts of: at least {_MIN_WORDS}")
        self._length_of_a = len(tokenizer.encode("a", add_special_tokens=False))
        common = list(dict.fromkeys(self._words))[:_COMMON_WORDS]
        self._singles = [word for word in common if self._count(word) == 1 and self._count_first(word) == 1]
        if not self._singles:
            raise ConfigurationError("no word of the text is a single token: give other --prompts")

    def passage(self, key: str, num_tokens: int) -> str:
        """Return a passage of ``num_tokens`` tokens, beginning with a space. Another ``key`` gives another passage.

        Equal keys and another length give the same words as far as both go, but for the last few.
        """
        rng = random.Random(key)
        place = rng.randrange(len(self._words))
        opening = [rng.choice(self._singles), *(rng.choice(self._words) for _ in range(_OPENING_WORDS - 1))]
        chosen: list[str] = []
        missing = num_tokens
        while missing > 0:
            if len(chosen) < len(opening):
                word = opening[len(chosen)]
            else:
                word, place = self._words[place], (place + 1) % len(self._words)
            count = self._count(word)
            if count > missing:
                word, count = rng.choice(self._singles), 1
            chosen.append(f" {word}")
            missing -= count
        return "".join(chosen)

    def fill(self, num_tokens: int) -> str:
        """Return ``num_tokens`` words of one token each."""
        return "".join(f" {self._singles[number % len(self._singles)]}" for number in range(num_tokens))

    def _count(self, word: str) -> int:
        count = self._counts.get(word)
        if count is None:
            ids = self._tokenizer.encode(f"a {word}", add_special_tokens=False)
            count = self._counts[word] = len(ids) - self._length_of_a
        return count

    def _count_first(self, word: str) -> int:
        """Return its tokens at the very start of a text."""
        return len(self._tokenizer.encode(word, add_special_tokens=False))


@dataclass(frozen=True, slots=True)
class PromptSource:
    """What prompts are made of. ``encode_chat`` is None where the model's chat template is not known."""

    words: Words
    encode: Encode
    encode_chat: Encode | None = None


class PromptMaker:
    """Makes the prompts of a run. Equal seeds, keys and prefixes give equal prompts.

    ``extra_tokens`` is what the server adds beyond what ``encode`` knows of, such as an unknown chat template's tokens.
    """

    def __init__(self, words: Words, encode: Encode, *, seed: int = 0, extra_tokens: int = 0) -> None:
        self._words = words
        self._encode = encode
        self._seed = seed
        self._extra = extra_tokens
        self._overhead = len(encode(words.fill(8).lstrip())) - 8 + extra_tokens

    @property
    def least_len(self) -> int:
        """Tokens of the shortest prompt: what the server adds, and one."""
        return self._overhead + 1

    def make(self, key: str, prompt_len: int, prefix: PrefixBlocks = NO_PREFIX) -> PromptText:
        """Return a prompt of ``prompt_len`` tokens in all, or of ``least_len`` where that is more.

        Prompts whose prefixes begin with equal ids begin with equal tokens, block after block. What follows the prefix
        is ``key``'s own. A text that cannot be made exact comes as near as it can; ``num_tokens`` tells.
        """
        wanted = max(prompt_len, self.least_len)
        parts = []
        missing = wanted - self._overhead
        for block in prefix.ids:
            if missing <= 0:
                break
            num_tokens = min(prefix.block_tokens, missing)
            parts.append(self._words.passage(f"{self._seed} block {block}", num_tokens))
            missing -= num_tokens
        if missing > 0:
            parts.append(self._words.passage(f"{self._seed} own {key}", missing))
        return self._corrected("".join(parts).lstrip(), wanted)

    def _corrected(self, text: str, wanted: int) -> PromptText:
        """Lengthen or shorten the end of ``text``, should its tokens not add up after all."""
        for _ in range(_MAX_CORRECTIONS):
            token_ids = self._encode(text)
            excess = len(token_ids) + self._extra - wanted
            if excess == 0:
                break
            if excess < 0:
                text += self._words.fill(-excess)
            else:
                text = " ".join(text.split(" ")[:-excess]) or self._words.fill(1).lstrip()
        else:
            token_ids = self._encode(text)
        return PromptText(text, token_ids, len(token_ids) + self._extra)
