"""Data sheets of devices, for predictions without a measurement."""

from dataclasses import dataclass
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names


@dataclass(frozen=True, kw_only=True)
class DeviceSheet:
    """What the manufacturer states, and what kernels reach of it.

    The four ``*_share`` are the parts of a peak that kernels reach: large matrix products of the operations, prefill
    attention likewise, small matrix products of the memory bandwidth, decode attention likewise. ``kernel_s`` is the
    least that a kernel takes, ``peer_latency_s`` the least that a message between devices takes.
    """

    name: str
    memory_bytes: float
    memory_bytes_per_s: float
    flops_per_s: float
    """Dense, in bf16."""
    peer_bytes_per_s: float
    """To another device of the node, one direction."""
    peer_latency_s: float = 10e-6
    kernel_s: float = 3e-6
    matmul_share: float
    attention_share: float
    weights_share: float
    kv_share: float


# Peaks, kernel_s and peer_latency_s: PyPI aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0), systems/*.yaml. Shares: the
# medians over its measured bf16 operators (vLLM 0.14.0 on A100, 0.24.0 on H100 and H200), namely GEMMs of 1,024 rows
# and more and of 8 and less with both weight dimensions at least 4,096, prefill attention over 1,024 to 4,096 tokens
# with 32 heads and more, decode attention that reads 100 MB and more. Isolated kernels at full clock: optimistic.
DEVICES: Final = {
    sheet.name: sheet
    for sheet in (
        DeviceSheet(
            name="a100-sxm",
            memory_bytes=80 * 2**30,
            memory_bytes_per_s=2.039e12,
            flops_per_s=312e12,
            peer_bytes_per_s=300e9,
            matmul_share=0.89,
            attention_share=0.45,
            weights_share=0.70,
            kv_share=0.59,
        ),
        DeviceSheet(
            name="h100-sxm",
            memory_bytes=80 * 2**30,
            memory_bytes_per_s=3.35e12,
            flops_per_s=989e12,
            peer_bytes_per_s=450e9,
            matmul_share=0.81,
            attention_share=0.41,
            weights_share=0.84,
            kv_share=0.68,
        ),
        DeviceSheet(
            name="h200-sxm",
            memory_bytes=141 * 2**30,
            memory_bytes_per_s=4.8e12,
            flops_per_s=989e12,
            peer_bytes_per_s=450e9,
            matmul_share=0.79,
            attention_share=0.41,
            weights_share=0.77,
            kv_share=0.59,
        ),
    )
}


def find_device(name: str) -> DeviceSheet:
    """Return a data sheet by name; raise ConfigurationError, naming those there are."""
    if name not in DEVICES:
        raise ConfigurationError(f"no data sheet of a device {name!r}; {known_names(name, DEVICES)}")
    return DEVICES[name]
