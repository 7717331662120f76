"""Chat templates: the words transformers renders, and errors a client can act on."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from disagg.base.errors import ConfigurationError, InvalidRequestError
from disagg.models.chat_template import ChatTemplate, load_chat_template
from disagg.models.locate import ModelFiles, ModelKind
from disagg.models.tokenizer import load_tokenizer

CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Why is the sky <blue> & "wide"?'}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  spaces \n"},
    ],
]

FEATURES = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == "skip" %}{% continue %}{% endif %}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
    {{- message | tojson }}
    {{ message | tojson(indent=2) }}
{% endfor %}
{% if add_generation_prompt %}GO{% endif %} {{ tools is none }} {{ mood | default("calm") }}"""


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_default_model_as_transformers_renders_it(
    default_model: ModelFiles, conversation: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    template = load_chat_template(default_model, load_tokenizer(default_model).special_tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template

        from disagg.models.gguf_file import GgufFile

        with GgufFile(default_model.path) as file:
            source = file.metadata["tokenizer.chat_template"]
        expected, _ = render_jinja_template(
            [conversation], chat_template=source, add_generation_prompt=add_generation_prompt
        )

    assert template.render(conversation, add_generation_prompt=add_generation_prompt) == expected[0]


@pytest.mark.parametrize("variables", [{}, {"mood": "gay"}])
def test_every_feature_as_transformers_renders_it(variables: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [*CONVERSATIONS[1], {"role": "skip", "content": "never"}]
    expected, _ = render_jinja_template(
        [conversation], chat_template=FEATURES, add_generation_prompt=True, bos_token="<s>", **variables
    )

    assert ChatTemplate(FEATURES, {"bos_token": "<s>"}).render(conversation, variables=variables) == expected[0]


def transformers_renders(template: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.utils.chat_template_utils import render_jinja_template

    (text,), _ = render_jinja_template([messages], chat_template=template, **settings)
    return str(text)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("message.content }}", "message.content | trim }}")
SKIPPING = CHATML.replace("{{ message.content", "{% if message.content %}say: {% endif %}{{ message.content")


@pytest.mark.parametrize("template", [CHATML, STRIPPING, SKIPPING])
@pytest.mark.parametrize(
    "begun", ["i", "", "\n", " ", "The riv", "  The riv  ", "im_end", "<|im_end|>", "Hello", "n\n"]
)
def test_a_final_message_is_continued_as_transformers_does(template: str, begun: str) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": begun}]
    expected = transformers_renders(template, messages, continue_final_message=True)

    assert ChatTemplate(template, {}).render_continued(messages) == expected


def test_a_final_message_that_is_not_written_cannot_be_continued() -> None:
    template = ChatTemplate("{% for message in messages[:-1] %}{{ message.content }}{% endfor %}", {})

    with pytest.raises(InvalidRequestError, match="does not write the final message"):
        template.render_continued(CONVERSATIONS[0])


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages | nothing }}",
        "{{ 1 // 0 }}",
        "{{ 'a' * 10**15 }}",
    ],
)
def test_whatever_goes_wrong_in_a_template_is_a_bad_request(source: str) -> None:
    with pytest.raises(InvalidRequestError, match="the chat template refuses"):
        ChatTemplate(source, {}).render(CONVERSATIONS[0])


def test_reading_a_template_computes_nothing() -> None:
    assert ChatTemplate("{{ 9 ** 9 ** 9 ** 9 }}", {}).available


def test_variables_take_the_place_of_no_argument() -> None:
    variables = {"self": 1, "documents": ["d"], "messages": "m"}

    assert ChatTemplate("{{ documents }}{{ messages | length }}", {}).render([], variables=variables) == "['d']0"


def test_the_date_is_available() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]).isdigit()


def test_a_refusal_of_the_template_reaches_the_client() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})

    with pytest.raises(InvalidRequestError, match="roles must alternate") as refusal:
        template.render([])
    assert refusal.value.param == "messages"


def test_messages_of_an_unexpected_shape_are_a_bad_request() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {})

    with pytest.raises(InvalidRequestError, match="refuses these messages"):
        template.render([{"role": "user", "content": None}])


def test_the_sandbox_holds() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}{{ messages.append(1) }}", {})

    with pytest.raises(InvalidRequestError):
        template.render([])


def test_a_model_without_template_says_what_to_use() -> None:
    template = ChatTemplate(None, {})

    assert not template.available
    with pytest.raises(InvalidRequestError, match="no chat template: use /v1/completions"):
        template.render(CONVERSATIONS[0])


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(ConfigurationError, match="does not compile"):
        ChatTemplate("{% for %}", {})


class TestWhereItIsFound:
    def load(self, folder: Path) -> str:
        files = ModelFiles(name="m", kind=ModelKind.HF_FOLDER, path=folder)
        return load_chat_template(files, {}).render([])

    def test_tokenizer_config(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))

        assert self.load(tmp_path) == "from config"

    def test_the_one_called_default_of_several(self, tmp_path: Path) -> None:
        named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

        assert self.load(tmp_path) == "plain"

    def test_a_file_of_its_own_wins(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))
        (tmp_path / "chat_template.jinja").write_text("from file")

        assert self.load(tmp_path) == "from file"

    def test_several_as_an_object(self, tmp_path: Path) -> None:
        named = {"chat_template": {"default": "plain", "tool_use": "tools"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))

        assert self.load(tmp_path) == "plain"

    def test_several_without_a_default(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        named = [{"name": "tool_use", "template": "tools"}]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))

        with pytest.raises(InvalidRequestError, match="no chat template"):
            self.load(tmp_path)
        assert "'tool_use'" in caplog.text

    def test_a_processors_file_where_no_other_is(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": None}))
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "from processor"}))

        assert self.load(tmp_path) == "from processor"

    def test_one_that_is_no_text_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": 3}))

        with pytest.raises(ConfigurationError, match=r"config\.json: 'chat_template' should be a text, got int"):
            self.load(tmp_path)

    def test_one_that_is_no_utf_8_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")

        with pytest.raises(ConfigurationError, match=r"cannot read .*chat_template\.jinja"):
            self.load(tmp_path)

    def test_nowhere(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequestError, match="no chat template"):
            self.load(tmp_path)
