"""What loading takes of memory: the weights, and little more, however large the file."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disagg.engine.model.weights import expected_shapes
from disagg.models.hf_config import config_from_hf

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 2000,
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}
PROGRAM = """
import sys
from pathlib import Path
import torch
from disagg.base.config import DType
from disagg.engine.allocator import keep_freed_memory
from disagg.engine.kernels.select import select_backend
from disagg.engine.model.weights import load_weights
from disagg.models.locate import load_config, locate_model

def resident_bytes(what):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[what].split()[0]) * 1024

def load(model):
    files = locate_model(model)
    return files, load_weights(files, load_config(files), backend, dtype=DType.BFLOAT16)

keep_freed_memory()
torch.set_num_threads(1)
backend = select_backend(torch.device("cpu"), torch.bfloat16, sys.argv[3])
tiny = load(sys.argv[2])  # the code itself becomes resident
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident_bytes("VmRSS")
files, weights = load(sys.argv[1])
print((resident_bytes("VmHWM") - before) / sum(path.stat().st_size for path in files.weight_files()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 160 MB in bfloat16, of many layers as large ones are, the element type that it is loaded in."""
    path = tmp_path_factory.mktemp("large")
    (path / "config.json").write_text(json.dumps(CONFIG))
    shapes = expected_shapes(config_from_hf(CONFIG))
    save_file(
        {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, path / "model.safetensors"
    )
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_loading_takes_at_most_a_fifth_more_than_the_file(
    folder: Path, kernels: str, tiny_model: Callable[..., Path]
) -> None:
    program = [sys.executable, "-c", PROGRAM, str(folder), str(tiny_model("llama")), kernels]
    loaded = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    if "native kernels cannot be used" in loaded.stderr:
        pytest.skip("the native kernels were not built")

    assert loaded.returncode == 0, loaded.stderr
    assert 0.9 < float(loaded.stdout) < 1.2
