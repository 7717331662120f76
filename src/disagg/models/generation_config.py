"""How a model's authors want it to be sampled, and which tokens end its answers: ``generation_config.json`` and others.

Followed as vLLM does: the fields of ``GenerationDefaults`` hold where a client sends none; ``do_sample`` is not looked
at. Beyond vLLM, end-of-sequence ids of every file count.
"""

import logging
from pathlib import Path
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.models.config import ModelConfig
from disagg.models.foreign import ForeignModel
from disagg.models.gguf_file import GgufFile
from disagg.models.json_fields import JsonFields
from disagg.models.locate import ModelFiles, ModelKind, read_json
from disagg.models.tokenizer import Tokenizer

_logger = logging.getLogger(__name__)

AUTO: Final = "auto"
NEUTRAL: Final = "vllm"
_FILE: Final = "generation_config.json"
_GGUF_NAMES: Final = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}
_NOT_APPLIED: Final[dict[str, tuple[object, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ({},),
    "stop_strings": ([],),
    "watermarking_config": (),
}
"""What transformers' ``generate`` would do and no server does, with the values beside null that do nothing."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a sampling field is where a client does not send it; None leaves the API's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the chosen file says. ``source`` names it in messages."""

    source: str
    defaults: GenerationDefaults = GenerationDefaults()
    eos_token_ids: tuple[int, ...] = ()


def load_generation_config(files: ModelFiles, choice: str = AUTO) -> GenerationConfig:
    """Return the defaults that ``--generation-config`` chooses.

    ``auto``: the model's own ``generation_config.json``, or ``config.json`` of an old model, or the sampling keys of a
    GGUF file. ``vllm``: none. Anything else: a folder with a ``generation_config.json``.
    Raises ConfigurationError for a folder without one, and for values that are no numbers.
    """
    if choice == NEUTRAL:
        return GenerationConfig(source=NEUTRAL)
    if choice != AUTO:
        path = Path(choice).expanduser() / _FILE
        if not path.is_file():
            raise ConfigurationError(
                f"--generation-config {choice!r} is no folder with a {_FILE}; give '{AUTO}' for the model's own, "
                f"'{NEUTRAL}' for none, or such a folder"
            )
        return _from_json(path)
    if files.kind is ModelKind.GGUF:
        return _from_gguf(files.path)
    path = files.path / _FILE
    return _from_json(path if path.is_file() else files.path / "config.json")


def end_token_ids(
    config: ModelConfig | ForeignModel, tokenizer: Tokenizer, chosen: GenerationConfig
) -> tuple[int, ...]:
    """Return every token that ends an answer: those of ``config.json``, generation config and tokenizer together.

    An id that the model cannot write (-1, or one outside its vocabulary) is left out, and warned of. Raises
    ConfigurationError where only such ids are stated: no answer would end.
    """
    text = tokenizer.special_tokens.get("eos_token")
    own = None if text is None else tokenizer.token_id(text)
    stated = dict.fromkeys((*config.eos_token_ids, *chosen.eos_token_ids, *(() if own is None else (own,))))
    usable = tuple(token_id for token_id in stated if 0 <= token_id < config.vocab_size)
    if useless := [token_id for token_id in stated if token_id not in usable]:
        reason = f"eos_token_id {useless[0]} is outside the vocabulary of {config.vocab_size} tokens"
        if not usable:
            raise ConfigurationError(
                f"{reason}, and no other token ends an answer: correct it in config.json, generation_config.json or "
                "tokenizer_config.json (null where answers shall not end by themselves)"
            )
        _logger.warning("%s and never ends an answer; these do: %s", reason, ", ".join(map(str, usable)))
    return usable


def _from_json(path: Path) -> GenerationConfig:
    fields = JsonFields(read_json(path), str(path))
    for name, neutral in _NOT_APPLIED.items():
        if fields.has(name) and fields.raw(name) not in neutral:
            _logger.warning("%s: %s = %r is not applied", path, name, fields.raw(name))
    numbers = {name: fields.get(name, float) for name in _GGUF_NAMES if name != "top_k" and fields.has(name)}
    integers = {"top_k": "top_k", "max_tokens": "max_new_tokens"}
    lengths = {ours: fields.get(theirs, int) for ours, theirs in integers.items() if fields.has(theirs)}
    return GenerationConfig(
        source=str(path),
        defaults=msgspec.convert({**numbers, **lengths}, GenerationDefaults),
        eos_token_ids=fields.token_ids("eos_token_id"),
    )


def _from_gguf(path: Path) -> GenerationConfig:
    with GgufFile(path) as file:
        keys = {ours: f"general.sampling.{theirs}" for ours, theirs in _GGUF_NAMES.items()}
        stored = {ours: file.metadata[key] for ours, key in keys.items() if key in file.metadata}
    try:
        return GenerationConfig(source=str(path), defaults=msgspec.convert(stored, GenerationDefaults))
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: metadata 'general.sampling.*': {error}") from error
