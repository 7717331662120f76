"""Chat messages to a prompt, by the model's own Jinja template, in the sandbox and with the helpers of transformers."""

import datetime
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from disagg.base.errors import ConfigurationError, InvalidRequestError
from disagg.models.gguf_file import GgufFile
from disagg.models.locate import ModelFiles, ModelKind, read_json

_logger = logging.getLogger(__name__)

_TEMPLATE_FAULTS: Final = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template raises when messages are not shaped as it expects."""


class ChatTemplate:
    """A model's template, compiled. ``source`` None stands for a model without one: rendering refuses, saying so.

    ``special_tokens`` (``bos_token`` and so on) are variables of the template.
    Raises ConfigurationError for a template that does not compile.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = None if source is None else _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigurationError(f"the model's chat template does not compile: {error}") from error

    @property
    def available(self) -> bool:
        """Whether the model has a template at all."""
        return self._template is not None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt; encode it with ``add_special_tokens=False``, as the template writes them itself.

        ``add_generation_prompt`` ends it where the assistant's answer begins. ``variables`` are further names that the
        template may use, such as Qwen3's ``enable_thinking``.

        Raises InvalidRequestError when the model has no template, or when the template refuses the messages.
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions with a prompt written out in full", "messages"
            )
        names = {**self._special_tokens, **(variables or {})}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            return self._template.render(**names, documents=None)
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error


def load_chat_template(files: ModelFiles, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """Read the template, of a GGUF file from its metadata.

    ``chat_template.jinja`` comes before ``tokenizer_config.json``, and that before a processor's
    ``chat_template.json``. Of several templates the one called ``default`` is taken.
    Raises ConfigurationError for a template that cannot be read or does not compile.
    """
    return ChatTemplate(_source(files), special_tokens)


def _source(files: ModelFiles) -> str | None:
    if files.kind is ModelKind.GGUF:
        with GgufFile(files.path) as file:
            stored = file.metadata.get("tokenizer.chat_template")
            return stored if isinstance(stored, str) else None
    if (path := files.file("chat_template.jinja")) is not None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read {path}: {error}") from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = files.file(name)
        template = read_json(path).get("chat_template") if path else None
        if template is not None:
            return _default_of(template, str(path))
    return None


def _default_of(template: object, source: str) -> str | None:
    """Return the one template, or the default of several: a list of names and texts, or an object. None without it."""
    if isinstance(template, list):
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        if "default" not in template:
            _logger.warning(
                "%s: 'chat_template' holds %s and none called 'default': chats are refused", source, sorted(template)
            )
            return None
        template = template["default"]
    if not isinstance(template, str):
        raise ConfigurationError(f"{source}: 'chat_template' should be a text, got {type(template).__name__}")
    return template


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here its body is plain text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way to declare)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format_string: str) -> str:
    return datetime.datetime.now().strftime(format_string)
