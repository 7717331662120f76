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

_MARK: Final = "CONTINUE_FINAL_MESSAGE_TAG"
"""Written behind a final message that is continued. transformers writes the same."""


class ChatTemplate:
    """A model's template. ``source`` None stands for a model without one: rendering refuses, saying so.

    ``special_tokens`` (``bos_token`` and so on) are variables of the template. Making one reads the source alone: to
    compile is to compute constants, which takes as long as the template wants, and is left to the first rendering.
    Raises ConfigurationError for a template that is no Jinja.
    """

    def __init__(self, source: str | None, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._compiled: jinja2.Template | None = None
        try:
            if source is not None:
                _environment().parse(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigurationError(f"the chat template does not compile: {error}") from error

    @property
    def available(self) -> bool:
        """Whether the model has a template at all."""
        return self.source is not None

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
        template may use, such as Qwen3's ``enable_thinking``. A template is a program: give it a process of its own
        where it must not hold up others.

        Raises InvalidRequestError when the model has no template, or when the template refuses the messages.
        """
        if self.source is None:
            raise InvalidRequestError(
                "this model has no chat template: use /v1/completions with a prompt written out in full", "messages"
            )
        names = {"documents": None, **self._special_tokens, **(variables or {})}
        names |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": tools}
        try:
            if self._compiled is None:
                self._compiled = _environment().from_string(self.source)
            return self._compiled.render(names)
        except Exception as error:  # whatever goes wrong in there is the template's, or what it was given
            words = str(error) or type(error).__name__
            raise InvalidRequestError(f"the chat template refuses these messages: {words}", "messages") from error

    def render_continued(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt up to the end of the final message's text, for an answer that goes on from there.

        The place is marked before rendering, as transformers does: the text may be empty, or occur elsewhere too.
        Raises as ``render`` does, and where the template does not write the final message.
        """
        mark = f"{_MARK} "
        marked = {**messages[-1], "content": f"{messages[-1]['content']}{mark}"}
        text = self.render([*messages[:-1], marked], add_generation_prompt=False, tools=tools, variables=variables)
        end = text.rfind(_MARK)
        if end < 0:
            raise InvalidRequestError(
                "'continue_final_message': the chat template does not write the final message", "messages"
            )
        # A template that strips messages has taken the mark's space, and would have taken what stands before the mark.
        return text[:end] if text.startswith(mark, end) else text[:end].rstrip()


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
