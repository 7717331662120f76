"""What prompts are made of: words, and the tokenizer and chat template that count them."""

from pathlib import Path

from disagg.bench.client.prompt_texts import PromptSource, Words, english_text, read_text
from disagg.models.chat_template import load_chat_template
from disagg.models.locate import ModelFiles, ModelKind, locate_model
from disagg.models.tokenizer import load_tokenizer


def load_prompt_source(tokenizer_name: str | None = None, prompts: Path | None = None) -> PromptSource:
    """Return what prompts are made of: words of a file, or English that Python carries, counted by a tokenizer.

    ``tokenizer_name`` is a model, a folder or a ``tokenizer.json``; None: the tokenizer of the default model. Raises
    ConfigurationError when one of them is not there.
    """
    files = _tokenizer_files(tokenizer_name)
    tokenizer = load_tokenizer(files)
    text = english_text() if prompts is None else read_text(prompts)
    template = load_chat_template(files, tokenizer.special_tokens)

    def encode_chat(content: str) -> list[int]:
        rendered = template.render([{"role": "user", "content": content}])
        return tokenizer.encode(rendered, add_special_tokens=False)

    return PromptSource(Words(text, tokenizer), tokenizer.encode, encode_chat if template.available else None)


def _tokenizer_files(name: str | None) -> ModelFiles:
    """Find a model, or a tokenizer without one: a ``tokenizer.json``, or a folder that holds it."""
    path = None if name is None else Path(name).expanduser()
    folder = path.parent if path is not None and path.name == "tokenizer.json" else path
    if folder is not None and (folder / "tokenizer.json").is_file():
        return ModelFiles(name=folder.name, kind=ModelKind.HF_FOLDER, path=folder)
    return locate_model(name)
