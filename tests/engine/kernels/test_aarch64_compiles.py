"""The kernels compile for ARM, where their portable vectors become NEON; skipped where no compiler for it is."""

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER = shutil.which("aarch64-linux-gnu-g++")
NATIVE = Path(__file__).parents[3] / "src/disagg/engine/kernels/native"
SOURCES = [source.name for source in sorted(NATIVE.glob("*.cpp")) if source.name != "module.cpp"]


@pytest.mark.skipif(COMPILER is None, reason="no aarch64-linux-gnu-g++")
@pytest.mark.parametrize("source", SOURCES)
def test_it_compiles(source: str) -> None:
    assert COMPILER is not None
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-DDISAGG_ISA=portable"]
    ran = subprocess.run([COMPILER, *flags, str(NATIVE / source)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
