"""Text to token ids and back, on the ``tokenizers`` library alone: transformers takes ten times as long to start."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import tokenizers

from disagg.base.errors import ConfigurationError, InvalidRequestError
from disagg.models.gguf_file import GgufFile
from disagg.models.gguf_tokenizer import special_tokens_from_gguf, tokenizer_from_gguf
from disagg.models.locate import ModelFiles, ModelKind, read_json

SPECIAL_TOKEN_NAMES: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-F]{2})>")
_METASPACE: Final = "\u2581"
_PRIMING_TOKENS: Final = 4
"""A character has at most four bytes, so at most that many tokens end inside one."""

_LONG_TEXT: Final = 32 * 1024
"""Characters from which on the library's batch form is used: without offsets, in two thirds of the time. It starts
threads, which the library warns of when the process starts others."""


class Tokenizer:
    """Encodes and decodes for one model. Immutable and safe to share between threads.

    ``special_tokens`` maps names such as ``bos_token`` to their text, for chat templates.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._spelling = _token_spelling(backend)
        self.strips_leading_space = self._spelling.strips_leading_space
        self._bytes_of: dict[int, bytes] = {}

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are control, not text."""
        return self._special_ids

    @property
    def vocab_size(self) -> int:
        """Number of ids that have a text; a model's own vocabulary may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def max_token_bytes(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes divided by this."""
        return max((len(self._spelling.to_bytes(token)) for token in self._backend.get_vocab()), default=1) or 1

    def to_json(self) -> str:
        """Return all but the special tokens' names in the form of ``tokenizer.json``, for another process."""
        return self._backend.to_str()

    @classmethod
    def from_json(cls, text: str, special_tokens: Mapping[str, str]) -> "Tokenizer":
        """Return the tokenizer that ``to_json`` wrote."""
        return cls(tokenizers.Tokenizer.from_str(text), special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of ``text``. Special tokens written out in it are recognised, as in transformers.

        ``add_special_tokens`` adds what the model wants around a prompt, such as a begin-of-sequence token; give False
        for a rendered chat, whose template has written them. Raises InvalidRequestError for text with lone surrogates.
        """
        try:
            if len(text) < _LONG_TEXT:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        except TypeError as error:
            raise InvalidRequestError("the text is not valid Unicode: it holds half of a surrogate pair") from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of ``token_ids``; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def is_special(self, token_id: int) -> bool:
        """Return whether the token is control, not text."""
        return token_id in self._special_ids

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is spelled ``text``, None where there is none."""
        return self._backend.token_to_id(text)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to the text; none for an id that the vocabulary does not have."""
        known = self._bytes_of.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else self._spelling.to_bytes(token)
            self._bytes_of[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """Return a token's own text, for showing it alone; part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")


class IncrementalDecoder:
    """Turns one sequence's tokens into text as they come, never emitting part of a character.

    A token costs time in its own length alone. All that ``push`` returned, and ``flush`` at the end, add up to
    ``decode`` of the tokens after ``prompt_token_ids``. (Under byte fallback, bytes that are no UTF-8 may show as
    another number of U+FFFD.) ``marks`` are special tokens that are never skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        marks: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._marks = marks
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_next = tokenizer.strips_leading_space and not prompt_token_ids
        for token_id in prompt_token_ids[-_PRIMING_TOKENS:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Return the text that is complete with this token; often the token's own, sometimes nothing yet."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id) and token_id not in self._marks:
            return ""
        return self._stripped(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """Return what is still held back: U+FFFD when the sequence ended inside a character."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        """Drop the one space that SentencePiece put before the very first word."""
        if self._strip_next and text:
            self._strip_next = False
            return text.removeprefix(" ")
        return text


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Read ``tokenizer.json`` of a folder, or build the tokenizer that a GGUF file's metadata describes.

    Raises ConfigurationError when there is none, UnsupportedModelError for a kind that is not known here.
    """
    if files.kind is ModelKind.GGUF:
        with GgufFile(files.path) as file:
            return Tokenizer(tokenizer_from_gguf(file), special_tokens_from_gguf(file))
    path = files.file("tokenizer.json")
    if path is None:
        raise ConfigurationError(
            f"{files.path} has no tokenizer.json; make one with transformers: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return Tokenizer(_read_tokenizer(path), _special_tokens(files))


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ConfigurationError(f"cannot read {path}: {error}") from error


def _special_tokens(files: ModelFiles) -> dict[str, str]:
    """Read names and texts of special tokens: a later file wins, as in transformers."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = files.file(name)
        entries = read_json(path) if path else {}
        for role in SPECIAL_TOKEN_NAMES:
            value = entries.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[role] = text
    return found


class _ByteLevelSpelling:
    """GPT-2's: each byte is one printable character. An added token with other characters stands for itself."""

    strips_leading_space = False

    def __init__(self) -> None:
        self._byte_of = {character: byte for byte, character in byte_alphabet().items()}

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes(self._byte_of[character] for character in token)
        except KeyError:
            return token.encode("utf-8")


class _SentencePieceSpelling:
    """SentencePiece's: a low line for a space, and ``<0xNN>`` for a byte without a piece of its own."""

    def __init__(self, strips_leading_space: bool) -> None:
        self.strips_leading_space = strips_leading_space

    def to_bytes(self, token: str) -> bytes:
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes((int(match[1], 16),))
        return token.replace(_METASPACE, " ").encode("utf-8")


def byte_alphabet() -> dict[int, str]:
    """Return the printable character of each byte: itself where it has one, else the next free one from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet.update((byte, chr(256 + index)) for index, byte in enumerate(others))
    return alphabet


def _token_spelling(backend: tokenizers.Tokenizer) -> _ByteLevelSpelling | _SentencePieceSpelling:
    """Read from the decoder how tokens spell bytes. Raises ConfigurationError for a decoder that is not known."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": None}
    parts = state.get("decoders", [state])
    kinds = [part["type"] for part in parts]
    if "ByteLevel" in kinds:
        return _ByteLevelSpelling()
    if kinds == ["Metaspace"]:
        return _SentencePieceSpelling(strips_leading_space=parts[0].get("prepend_scheme", "always") != "never")
    if "ByteFallback" in kinds:
        return _SentencePieceSpelling(any(part["type"] == "Strip" and part["start"] > 0 for part in parts))
    raise ConfigurationError(
        f"the tokenizer's decoder {kinds} is not supported; supported: ByteLevel (GPT-2, Llama 3, Qwen) and "
        "SentencePiece with byte fallback (Llama 2, Mistral)"
    )
