"""What is said of a model that is there and cannot be loaded."""

from pathlib import Path

import gguf
import numpy as np
from gguf_writing import LLAMA_METADATA, write_gguf

from disagg.models.listing import describe_model


def test_blocks_that_nothing_reads_are_named(tmp_path: Path) -> None:
    """Q8_1, an intermediate form of llama.cpp's: the type in the header of a file that was written as float32."""
    name = b"token_embd.weight"
    path = write_gguf(tmp_path / "model.gguf", "llama", LLAMA_METADATA, {name.decode(): np.zeros((320, 64))})
    assert describe_model(str(path)).problem is None
    data = bytearray(path.read_bytes())
    after_dimensions = data.index(name) + len(name) + 4 + 2 * 8
    data[after_dimensions : after_dimensions + 4] = int(gguf.GGMLQuantizationType.Q8_1).to_bytes(4, "little")
    path.write_bytes(data)
    problem = describe_model(str(path)).problem
    assert problem is not None
    assert "'token_embd.weight' is stored as Q8_1, which cannot be dequantised" in problem
    assert "Q8_0 or Q4_K_M" in problem
