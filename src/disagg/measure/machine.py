"""What a measurement was made on: processor, memory, kernel, and the versions of what took part."""

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Final

import msgspec

PACKAGES: Final = ("disagg", "torch", "numpy", "tokenizers", "uvicorn", "httpx")
"""Packages whose versions bear on what is measured."""
INSTRUCTION_SETS: Final = (
    *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2"),
)
"""Processor flags that decide which kernels can run, x86 and Arm."""


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine. Unknown things are empty or 0."""

    processor: str
    num_cores: int
    """Cores that this process may use."""
    instruction_sets: tuple[str, ...]
    """Those of ``INSTRUCTION_SETS`` that the processor has."""
    memory_bytes: int
    kernel: str
    python: str
    packages: dict[str, str]
    """Version of each installed package of ``PACKAGES``."""

    def facts(self) -> dict[str, str]:
        """Return what there is to tell, for people, by label."""
        facts = {
            "Processor": self.processor,
            "Cores": str(self.num_cores),
            "Instruction sets": ", ".join(self.instruction_sets),
            "Memory": f"{self.memory_bytes / 2**30:.1f} GiB" if self.memory_bytes else "",
            "Kernel": self.kernel,
            "Python": self.python,
            "Packages": ", ".join(f"{name} {version}" for name, version in self.packages.items()),
        }
        return {label: fact for label, fact in facts.items() if fact}


def this_machine() -> Machine:
    """Return the facts of the machine and of the environment that this process runs in."""
    processor, flags = parse_cpu_facts(_read(Path("/proc/cpuinfo")))
    return Machine(
        processor=processor or platform.processor() or platform.machine(),
        num_cores=len(os.sched_getaffinity(0)),
        instruction_sets=tuple(name for name in INSTRUCTION_SETS if name in flags),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages=_versions(PACKAGES),
    )


def parse_cpu_facts(text: str) -> tuple[str, frozenset[str]]:
    """Return the processor's name and its flags out of the text of ``/proc/cpuinfo``; empty where it does not say."""
    name, flags = "", frozenset[str]()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "model name" if not name:
                name = value.strip()
            case "flags" | "Features" if not flags:
                flags = frozenset(value.split())
    return name, flags


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
