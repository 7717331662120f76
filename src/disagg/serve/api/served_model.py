"""The model as the API knows it: a name, a tokenizer, a chat template, and which tokens end an answer."""

import time
from dataclasses import dataclass, field

import msgspec

from disagg.models.chat_template import ChatTemplate
from disagg.models.generation_config import GenerationDefaults
from disagg.models.tokenizer import Tokenizer
from disagg.models.tool_calls.syntax import AnswerSyntax


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model under one name. The API names KV blocks of ``hash_block_size`` tokens: see ``block_hash``.

    ``trusts_request_templates`` lets a request bring its own chat template, a program in a sandbox.
    """

    name: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    hash_block_size: int
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    """What sampling fields are where a client does not send them."""
    trusts_request_templates: bool = False
    syntax: AnswerSyntax = field(default_factory=AnswerSyntax)
    """How it writes tool calls and reasoning."""
    created: int = field(default_factory=lambda: int(time.time()))

    def to_bytes(self) -> bytes:
        """Return the model as another process of this server can read it."""
        return msgspec.msgpack.encode(
            _Written(
                name=self.name,
                tokenizer=self.tokenizer.to_json(),
                special_tokens=self.tokenizer.special_tokens,
                chat_template=self.chat_template.source,
                eos_token_ids=self.eos_token_ids,
                vocab_size=self.vocab_size,
                hash_block_size=self.hash_block_size,
                trusts_request_templates=self.trusts_request_templates,
                syntax=self.syntax,
                created=self.created,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "ServedModel":
        """Return the model that ``to_bytes`` wrote."""
        written = msgspec.msgpack.decode(data, type=_Written)
        return cls(
            name=written.name,
            tokenizer=Tokenizer.from_json(written.tokenizer, written.special_tokens),
            chat_template=ChatTemplate(written.chat_template, written.special_tokens),
            eos_token_ids=written.eos_token_ids,
            vocab_size=written.vocab_size,
            hash_block_size=written.hash_block_size,
            trusts_request_templates=written.trusts_request_templates,
            syntax=written.syntax,
            created=written.created,
        )


class _Written(msgspec.Struct, frozen=True, kw_only=True):
    """A ServedModel as data."""

    name: str
    tokenizer: str
    special_tokens: dict[str, str]
    chat_template: str | None
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    hash_block_size: int
    trusts_request_templates: bool
    syntax: AnswerSyntax
    created: int
