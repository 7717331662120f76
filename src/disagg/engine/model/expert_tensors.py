"""The tensors of a layer that is a mixture of experts: their names in Hugging Face's files, and their shapes."""

import re
from dataclasses import dataclass, replace
from typing import Final

from disagg.models.config import Architecture, ModelConfig
from disagg.models.gguf_file import GgufTensor
from disagg.models.shape import Experts


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a family keeps its experts in a layer, and what it calls their three matrices."""

    block: str
    gate: str
    up: str
    down: str

    @property
    def router(self) -> str:
        """The router's projection."""
        return f"{self.block}.gate"

    @property
    def shared_gate(self) -> str:
        """The gate of the shared expert."""
        return f"{self.block}.shared_expert_gate"

    @property
    def shared(self) -> str:
        """The shared expert."""
        return f"{self.block}.shared_expert"

    def expert(self, number: int) -> str:
        """One expert."""
        return f"{self.block}.experts.{number}"


_MIXTRAL: Final = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
PLAIN_NAMES: Final = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")
"""Those of all other families, and of dense layers."""


def expert_names(config: ModelConfig) -> ExpertNames:
    """Return the names of the model's family."""
    return _MIXTRAL if config.architecture is Architecture.MIXTRAL else PLAIN_NAMES


_GGUF_NAME: Final = re.compile(
    r"blk\.(?P<layer>\d+)\.ffn_(?:(?P<gate>gate_inp)|(?P<kind>gate|up|down))(?:_(?P<whose>exps|shexp))?\.weight"
)
"""What llama.cpp calls routers and experts: one tensor for all experts of a layer, ``shexp`` for the shared one."""


def gguf_expert_tensors(tensor: GgufTensor, config: ModelConfig) -> dict[str, GgufTensor] | None:
    """Return the matrices of a GGUF tensor of experts, or of their router, under Hugging Face's names.

    None for any other tensor, and in models without experts.
    """
    match = _GGUF_NAME.fullmatch(tensor.name)
    if match is None or not config.layer_experts:
        return None
    names, prefix, whose = expert_names(config), f"model.layers.{match['layer']}.", match["whose"]
    if match["gate"] and whose is None:
        return {f"{prefix}{names.router}.weight": tensor}
    if match["gate"] and whose == "shexp":  # one row, which the converter writes as a vector
        return {f"{prefix}{names.shared_gate}.weight": replace(tensor, shape=(1, tensor.shape[-1]))}
    if match["gate"] or whose is None:
        return None
    part = {"gate": names.gate, "up": names.up, "down": names.down}[match["kind"]]
    if whose == "shexp":
        return {f"{prefix}{names.shared}.{part}.weight": tensor}
    return {f"{prefix}{names.expert(number)}.{part}.weight": matrix for number, matrix in enumerate(tensor.split())}


def expert_shapes(config: ModelConfig, experts: Experts) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of such a layer's MLP, by its name in the layer, in order of use."""
    names, hidden = expert_names(config), config.hidden_size

    def gated(block: str, inner: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{block}.{names.gate}.weight": (inner, hidden),
            f"{block}.{names.up}.weight": (inner, hidden),
            f"{block}.{names.down}.weight": (hidden, inner),
        }

    shapes: dict[str, tuple[int, ...]] = {f"{names.router}.weight": (experts.num_experts, hidden)}
    for number in range(experts.num_experts):
        shapes |= gated(names.expert(number), experts.intermediate_size)
    if experts.shared_intermediate_size:
        shapes[f"{names.shared_gate}.weight"] = (1, hidden)
        shapes |= gated(names.shared, experts.shared_intermediate_size)
    return shapes
