"""Build the optional native code; everything else is in pyproject.toml.

``kernels.cpp`` is compiled once per instruction set and chosen at run time; the codec of the transfer room is small
enough for the compiler's own clones. Where there is no compiler, or one that is
too old, installation goes on without: the PyTorch backend then takes over, and says so.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from pybind11.setup_helpers import build_ext as pybind11_build_ext
from setuptools import setup
from setuptools.extension import Extension

NATIVE = Path("src/disagg/engine/kernels/native")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"]
X86_FLAGS = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"}
FLAGS = [
    "-O3",
    "-g0",  # Python's own flags ask for debug information, which takes a quarter of the time
    "-falign-loops=64",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-Wall",
    # GCC takes the placeholder inside its own AVX-512 intrinsics for an uninitialised variable (its bug 105593).
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


class BuildNative(pybind11_build_ext):
    """Adds to the extension the object files of kernels.cpp, one per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels side by side, then whatever else the extension has, and link."""

        def compile_for(instruction_set: tuple[str, list[str]]) -> list[str]:
            name, flags = instruction_set
            return self.compiler.compile(
                [str(NATIVE / "kernels.cpp")],
                output_dir=str(Path(self.build_temp) / name),
                macros=[("DISAGG_ISA", name)],
                extra_postargs=["-std=c++17", *FLAGS, *flags],
                depends=ext.depends,
            )

        if ext is not kernels:
            super().build_extension(ext)
            return
        instruction_sets = {"portable": [], **(X86_FLAGS if IS_X86 else {})}
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            for objects in pool.map(compile_for, instruction_sets.items()):
                ext.extra_objects += objects
        super().build_extension(ext)


kernels = Pybind11Extension(
    "disagg.engine.kernels._native",
    sources=[
        str(NATIVE / f"{name}.cpp")
        for name in (
            "module",
            "core_board",
            "decoder_stack",
            "helpers",
            "mlp",
            "packed_linear",
            "parallel",
            "sampling",
            "step",
        )
    ],
    depends=[str(header) for header in sorted(NATIVE.glob("*.h"))],
    define_macros=[("DISAGG_X86", "1")] if IS_X86 else [],
    extra_compile_args=[*FLAGS],
    libraries=["dl"],
    cxx_std=17,
    optional=True,
)

codec = Pybind11Extension(
    "disagg.transfer._native",
    sources=["src/disagg/transfer/native/codec.cpp"],
    # Without contraction it rounds as its NumPy form does.
    extra_compile_args=[*FLAGS, "-ffp-contract=off"],
    cxx_std=17,
    optional=True,
)

with ParallelCompile(default=os.cpu_count() or 1):
    setup(ext_modules=[kernels, codec], cmdclass={"build_ext": BuildNative})
