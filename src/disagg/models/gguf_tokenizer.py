"""The tokenizer that a GGUF file's metadata describes, built with the ``tokenizers`` library.

A file names its pre-tokenizer (``tokenizer.ggml.pre``), whose regular expression is not in it. The expressions are
those of the models' own ``tokenizer.json``; names, ``ignore_merges`` and begin-of-sequence defaults follow llama.cpp's
``llama-vocab.cpp``.
"""

from typing import Final

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from disagg.base.errors import ConfigurationError, DisaggError, UnsupportedModelError
from disagg.models.gguf_file import GgufFile

_PREFIX: Final = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_LLAMA3_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES: Final = ("llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe")
_QWEN2_NAMES: Final = ("qwen2", "deepseek-r1-qwen", "megrez")
_GPT2_NAMES: Final = ("gpt-2", "default")
_SUPPORTED: Final = ("smollm", "tekken", *_LLAMA3_NAMES, *_QWEN2_NAMES, *_GPT2_NAMES)


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """Build the tokenizer of a GGUF file.

    Raises UnsupportedModelError, naming the kind, for one that is not known here, ConfigurationError for a broken one.
    """
    try:
        return _build(file)
    except DisaggError:
        raise
    except Exception as error:  # the library raises bare Exception for every fault
        raise ConfigurationError(f"{file.path}: the tokenizer in its metadata is broken: {error}") from error


def _build(file: GgufFile) -> Tokenizer:
    kind = file.metadata.get(f"{_PREFIX}model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(file)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(file), True
    else:
        raise UnsupportedModelError(
            f"{file.path}: tokenizer {kind!r} (key '{_PREFIX}model') is not supported; supported: 'gpt2' (byte-level "
            "BPE), 'llama' (SentencePiece BPE)"
        )
    _add_special_tokens(tokenizer, file)
    _add_post_processor(tokenizer, file, adds_bos)
    return tokenizer


def special_tokens_from_gguf(file: GgufFile) -> dict[str, str]:
    """Return the texts of the special tokens, under the names that chat templates know.

    Raises ConfigurationError for a begin-of-sequence or unknown token outside the vocabulary. One of the others is
    left out: a padding token is never used, and of an end of sequence ``generation_config.end_token_ids`` tells.
    """
    tokens = _strings(file, "tokens")
    for role in ("bos", "unknown"):
        key = f"{_PREFIX}{role}_token_id"
        token_id = file.metadata.get(key, 0)
        if not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
            raise ConfigurationError(f"{file.path}: '{key}' should be below {len(tokens)}, got {token_id!r}")
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: file.metadata.get(f"{_PREFIX}{role}_token_id") for name, role in roles.items()}
    return {name: tokens[index] for name, index in ids.items() if isinstance(index, int) and 0 <= index < len(tokens)}


def _byte_level(file: GgufFile) -> tuple[Tokenizer, bool]:
    """Return GPT-2's kind, and whether such models want a begin-of-sequence token when the file does not say."""
    name = file.metadata.get(f"{_PREFIX}pre", "default")
    if name not in _SUPPORTED:
        raise UnsupportedModelError(
            f"{file.path}: pre-tokenizer {name!r} (key '{_PREFIX}pre') is not supported; supported: "
            + ", ".join(repr(known) for known in _SUPPORTED)
        )
    llama3 = name in _LLAMA3_NAMES
    tokenizer = Tokenizer(_byte_level_model(file, ignore_merges=llama3 or name == "tekken"))
    tokenizer.decoder = decoders.ByteLevel()
    if name in _GPT2_NAMES:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif name == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif llama3:
        tokenizer.pre_tokenizer = _split_then_bytes(_LLAMA3_SPLIT)
    elif name == "tekken":
        tokenizer.pre_tokenizer = _split_then_bytes(_TEKKEN_SPLIT)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split_then_bytes(_QWEN2_SPLIT)
    return tokenizer, llama3


def _byte_level_model(file: GgufFile, ignore_merges: bool) -> models.BPE:
    vocabulary, stored = _vocabulary(file), _strings(file, "merges")
    merges = [_split_merge(merge) for merge in stored]
    try:
        return models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library's own message does not say which merge
        for merge, (left, right) in zip(stored, merges, strict=True):
            if not {left, right, left + right} <= vocabulary.keys():
                raise ConfigurationError(
                    f"{file.path}: '{_PREFIX}merges' holds {merge!r}, which does not join two tokens into a third"
                ) from error
        raise


def _vocabulary(file: GgufFile) -> dict[str, int]:
    """Return the id of each token. Raises ConfigurationError where two are spelled alike."""
    tokens = _strings(file, "tokens")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        first, token = next((index, token) for index, token in enumerate(tokens) if vocabulary[token] != index)
        raise ConfigurationError(
            f"{file.path}: '{_PREFIX}tokens' holds {token!r} twice, as {first} and as {vocabulary[token]}"
        )
    return vocabulary


def _split_then_bytes(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece(file: GgufFile) -> Tokenizer:
    """SentencePiece BPE with byte fallback, as Llama 2's and Mistral's ``tokenizer.json`` state it."""
    tokens = _strings(file, "tokens")
    scores = file.metadata.get(f"{_PREFIX}scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ConfigurationError(f"{file.path}: '{_PREFIX}scores' should hold a score for each of {len(tokens)} tokens")
    vocabulary = _vocabulary(file)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(vocabulary, scores.tolist()),
            unk_token=special_tokens_from_gguf(file).get("unk_token", tokens[0]),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepends = bool(file.metadata.get(f"{_PREFIX}add_space_prefix", True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if prepends else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, decoders.Strip(" ", 1, 0)] if prepends else undo)
    return tokenizer


def _merges_by_score(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Recover merges, which SentencePiece does not store: a token of higher score is merged earlier."""
    merges = [
        (score, token[:cut], token[cut:])
        for token, score in zip(vocabulary, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges.sort(key=lambda merge: (-merge[0], vocabulary[merge[1]], vocabulary[merge[2]]))
    return [(left, right) for _, left, right in merges]


def _split_merge(merge: str) -> tuple[str, str]:
    """Cut a stored merge at the space between its parts; byte-level tokens hold none themselves."""
    left, _, right = merge.partition(" ")
    return left, right


def _add_special_tokens(tokenizer: Tokenizer, file: GgufFile) -> None:
    tokens = _strings(file, "tokens")
    kinds = file.metadata.get(f"{_PREFIX}token_type")
    if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
        raise ConfigurationError(
            f"{file.path}: '{_PREFIX}token_type' should hold a type for each of {len(tokens)} tokens"
        )
    special = np.flatnonzero((kinds == _CONTROL) | (kinds == _UNKNOWN)).tolist()
    defined = np.flatnonzero(kinds == _USER_DEFINED).tolist()
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in special])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in defined])


def _add_post_processor(tokenizer: Tokenizer, file: GgufFile, adds_bos: bool) -> None:
    """Put begin and end of sequence around a text, where the file (or the kind's habit) says so."""
    names = special_tokens_from_gguf(file)
    bos = names.get("bos_token") if file.metadata.get(f"{_PREFIX}add_bos_token", adds_bos) else None
    eos = names.get("eos_token") if file.metadata.get(f"{_PREFIX}add_eos_token", False) else None
    if bos is None and eos is None:
        return
    pieces = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
    pairs = [(token, tokenizer.token_to_id(token)) for token in (bos, eos) if token]
    tokenizer.post_processor = processors.TemplateProcessing(single=" ".join(pieces), special_tokens=pairs)


def _strings(file: GgufFile, name: str) -> list[str]:
    values = file.metadata.get(f"{_PREFIX}{name}")
    if not isinstance(values, list):
        raise ConfigurationError(f"{file.path}: metadata has no list '{_PREFIX}{name}'; the file holds no tokenizer")
    return values
