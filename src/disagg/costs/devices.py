"""Data sheets of devices, for predictions without a measurement."""

from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.costs.links import LinkKind, LinkModel


@dataclass(frozen=True, kw_only=True)
class DeviceSheet:
    """What the manufacturer states, and what kernels reach of it.

    The four ``*_share`` are the parts of a peak that kernels reach: large matrix products of the operations, prefill
    attention likewise, small matrix products of the memory bandwidth, decode attention likewise. ``kernel_s`` is the
    least that a kernel takes.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    """Dense, in bf16."""
    peer: LinkModel
    """To another device of the node."""
    watts: float | None = None
    """At most; None where nobody stated it."""
    kernel_s: float = 3e-6
    matmul_share: float
    attention_share: float
    weights_share: float
    kv_share: float


# Peaks, watts, links and kernel_s: PyPI aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/*.yaml. Shares: the
# medians over its measured bf16 operators (vLLM 0.14.0 on A100, 0.24.0 on the others), namely GEMMs of 1,024 rows
# and more and of 8 and less with both weight dimensions at least 4,096, prefill attention over 1,024 to 4,096 tokens
# with 32 heads and more, decode attention that reads 100 MB and more. Isolated kernels at full clock: optimistic.
_A100 = DeviceSheet(
    name="a100-sxm",
    memory_bytes=80 * 2**30,
    memory_bytes_per_s=2.039e12,
    flops_per_s=312e12,
    peer=LinkModel(300e9, 10e-6, kind=LinkKind.NVLINK),
    watts=400,
    matmul_share=0.89,
    attention_share=0.45,
    weights_share=0.70,
    kv_share=0.59,
)
_H100 = DeviceSheet(
    name="h100-sxm",
    memory_bytes=80 * 2**30,
    memory_bytes_per_s=3.35e12,
    flops_per_s=989e12,
    peer=LinkModel(450e9, 10e-6, kind=LinkKind.NVLINK),
    watts=700,
    matmul_share=0.81,
    attention_share=0.41,
    weights_share=0.84,
    kv_share=0.68,
)
_H200 = DeviceSheet(
    name="h200-sxm",
    memory_bytes=141 * 2**30,
    memory_bytes_per_s=4.8e12,
    flops_per_s=989e12,
    peer=LinkModel(450e9, 10e-6, kind=LinkKind.NVLINK),
    watts=700,
    matmul_share=0.79,
    attention_share=0.41,
    weights_share=0.77,
    kv_share=0.59,
)
_L40S = DeviceSheet(
    name="l40s",
    memory_bytes=46_068 * 2**20,
    memory_bytes_per_s=864e9,
    flops_per_s=362.05e12,
    peer=LinkModel(32e9, 10e-6, kind=LinkKind.PCIE),
    watts=350,
    matmul_share=0.64,
    attention_share=0.42,
    weights_share=0.81,
    kv_share=0.72,
)
# One core of a Zen 5 server under the native kernels. Peaks and shares are measured (docs/results/engine.md,
# SmolLM2-135M on one thread): what the core reaches in matrix products and reads from memory, and what part of it
# steps reach. Cores together read less than each alone: a profile knows, a data sheet does not. A step is one call: no
# cost per kernel.
_ZEN5_CORE = DeviceSheet(
    name="zen5-core",
    memory_bytes=12 * 2**30,  # of a host with 24 GiB for two cores
    memory_bytes_per_s=39e9,
    flops_per_s=456e9,
    peer=LinkModel(20e9, kind=LinkKind.SHM),  # a copy between two processes' shared memory
    kernel_s=0.0,
    matmul_share=0.93,
    attention_share=0.80,
    weights_share=0.93,
    kv_share=0.62,
)

DEVICES: Final = {sheet.name: sheet for sheet in (_A100, _H100, _H200, _L40S, _ZEN5_CORE)}


def find_device(name: str) -> DeviceSheet:
    """Return a data sheet by name; raise ConfigurationError, naming those there are."""
    if name not in DEVICES:
        raise ConfigurationError(f"no data sheet of a device {name!r}; {known_names(name, DEVICES)}")
    return DEVICES[name]
