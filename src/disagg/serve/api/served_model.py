"""The model as the API knows it: a name, a tokenizer, a chat template, and which tokens end an answer."""

import time
from dataclasses import dataclass, field

from disagg.models.chat_template import ChatTemplate
from disagg.models.generation_config import GenerationDefaults
from disagg.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model under one name. ``block_size`` is that of the instances' KV blocks, whose prefixes the API names.

    ``trusts_request_templates`` lets a request bring its own chat template: sandboxed, but free to compute for long.
    """

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    block_size: int
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What sampling fields are where a client does not send them."""
    trusts_request_templates: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
