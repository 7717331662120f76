"""Data sheets against the files that they were taken from."""

from pathlib import Path

import pytest
import yaml

from disagg.costs.devices import DEVICES


@pytest.mark.parametrize("name", ["a100-sxm", "h100-sxm", "h200-sxm"])
def test_peaks_are_those_of_the_source(name: str, reference_data: Path) -> None:
    file = reference_data / "silicon" / "aiconfigurator" / f"{name.replace('-', '_')}.system.yaml"
    source = yaml.safe_load(file.read_text(encoding="utf-8"))
    gpu, node, sheet = source["gpu"], source["node"], DEVICES[name]
    assert sheet.memory_bytes == gpu["mem_capacity"]
    assert sheet.memory_bytes_per_s == gpu["mem_bw"]
    assert sheet.flops_per_s == gpu["bfloat16_tc_flops"]
    assert sheet.watts == gpu["power"]
    assert (sheet.peer.bytes_per_s, sheet.peer.latency_s) == (node["intra_node_bw"], node["p2p_latency"])


@pytest.mark.parametrize("name", DEVICES)
def test_no_kernel_reaches_more_than_the_peak(name: str) -> None:
    sheet = DEVICES[name]
    assert sheet.name == name
    for share in (sheet.matmul_share, sheet.attention_share, sheet.weights_share, sheet.kv_share):
        assert 0.3 < share < 1
