"""Prefill and decode that differ in kernels, element type and weights are one deployment: KV blocks are converted."""

from pathlib import Path

import pytest
from server_process import completion, serving

COMMON = ("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "128MiB", "--threads", "1")
PROMPT = "Once upon a time, in a village by the sea, there lived a"
GREEDY = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
KINDS = {
    "kernels": ("kernels: torch", "kernels: native"),
    "dtype": ("dtype: bfloat16", "dtype: float32"),
    "weights": ("dtype: float32", "quantization: int8"),
}


@pytest.fixture(scope="module")
def alone() -> str:
    """The answer of one instance in float32."""
    with serving("--colocated", "1", *COMMON) as server:
        return str(completion(server, PROMPT, **GREEDY).choices[0].text)


@pytest.mark.parametrize("kind", KINDS)
def test_unequal_instances_hand_over(kind: str, alone: str, tmp_path: Path) -> None:
    prefill, decode = KINDS[kind]
    placement = tmp_path / "placement.yaml"
    placement.write_text(
        f"groups:\n  - {{role: prefill, count: 1, {prefill}}}\n  - {{role: decode, count: 1, {decode}}}\n"
    )
    link = "tcp" if kind == "dtype" else "auto"
    with serving("--placement", str(placement), *COMMON, "--kv-link", link) as server:
        found = completion(server, PROMPT, **GREEDY)
        assert server.metric("disagg:hand_over_bytes_total") > 0, server.text
        assert server.metric("disagg:hand_over_failures_total") == 0, server.text
        if kind != "weights":
            assert "converted from" in server.text
        text = found.choices[0].text
        assert found.usage is not None
        assert found.usage.completion_tokens == GREEDY["max_tokens"]
        if kind == "kernels":  # float32 in another order of the elements is still exact
            assert text == alone
        else:  # fewer bits on one side: the answer begins alike
            assert text[:8] == alone[:8]
