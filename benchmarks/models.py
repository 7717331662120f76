"""A mixture of experts beside the dense model of its active size, in each form in which weights can lie in memory.

    .venv/bin/python benchmarks/models.py [--layers 8]

Weights are random: how fast a product is does not depend on them, and a router over noise prefers no expert. The
mixture has 32 experts of 512 in each layer and 4 of them for each token, hidden vectors of 1,024, 16 heads and 8 KV
heads of 64, and a vocabulary of 32,000; the dense model has an MLP of 4 x 512 and all else alike. Times are CPU times
of one thread, the least of some runs: what other programs take of the machine is counted as little as can be.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from disagg.engine.benchmark.cases import Phase, StepCase
from disagg.engine.benchmark.engine_benchmark import make_batch
from disagg.engine.kernels.blocks import BlockFormat, BlockWeight
from disagg.engine.kernels.int8 import quantize_int8
from disagg.engine.kernels.interface import DecoderWeights, DenseMlp, LayerWeights, Linear, SparseMlp
from disagg.engine.kernels.native_backend import NativeBackend
from disagg.engine.kernels.weight_memory import PRIVATE, CountedMemory
from disagg.engine.model.decoder import Decoder
from disagg.models.config import ModelConfig
from disagg.models.hf_config import config_from_hf

BFLOAT16 = torch.bfloat16
SHAPE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense, MLP of 2,048": {"architectures": ["LlamaForCausalLM"], "intermediate_size": 2048},
    "32 experts of 512, 4 a token": {
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": 512,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
}
CASES = [
    StepCase(Phase.PREFILL, 1, 256, 256),
    *(StepCase(Phase.DECODE, batch, 1, 512) for batch in (1, 4, 16)),
]
BLOCK_SIZE = 64
ROUNDS = 5
MakeLinear = Callable[[int, int, CountedMemory], Linear]


def forms(backend: NativeBackend) -> Iterator[tuple[str, MakeLinear]]:
    """Yield how a random matrix [out_features, in_features] is packed, by the name of the form."""

    def dense(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns).mul_(columns**-0.5).to(BFLOAT16)

    def blocks(kind: BlockFormat) -> MakeLinear:
        low, high = (0, 16) if kind.bits == 4 else (-127, 128)
        size = 0.1 / high

        def make(rows: int, columns: int, memory: CountedMemory) -> Linear:
            scale = torch.full((rows, columns // kind.scale_size), size / (32 if kind.refines else 1)).half()
            factor = torch.full((rows, columns // kind.block_size), 32, dtype=torch.int8) if kind.refines else None
            values = torch.randint(low, high, (rows, columns), dtype=torch.int8)
            offset = scale * 7.5 if kind.has_offsets else None
            weight = BlockWeight(kind, values, scale, offset, factor, factor if kind.has_offsets else None)
            return backend.block_linear(weight, None, BFLOAT16, memory)

        return make

    yield "bf16", lambda rows, columns, memory: backend.linear(dense(rows, columns), None, memory)
    yield (
        "int8",
        lambda rows, columns, memory: backend.int8_linear(quantize_int8(dense(rows, columns)), None, BFLOAT16, memory),
    )
    yield "Q8_0", blocks(BlockFormat.BYTES32)
    yield "Q4_K", blocks(BlockFormat.NIBBLES32_SUB_OFFSET)


def random_weights(config: ModelConfig, backend: NativeBackend, make: MakeLinear) -> DecoderWeights:
    """Return weights of the form that ``make`` gives; the router is in bfloat16, as when they are loaded."""
    memory = CountedMemory(PRIVATE)
    hidden = config.hidden_size

    def norm() -> torch.Tensor:
        return memory.keep(torch.ones(hidden, dtype=BFLOAT16))

    def gated(inner: int) -> DenseMlp:
        return DenseMlp(gate_up=make(2 * inner, hidden, memory), down=make(hidden, inner, memory))

    def mlp(layer: int) -> DenseMlp | SparseMlp:
        experts = config.layer_experts[layer] if config.layer_experts else None
        if experts is None:
            return gated(config.intermediate_size)
        return SparseMlp(
            router=backend.linear(torch.randn(experts.num_experts, hidden).to(BFLOAT16), None, memory),
            experts=tuple(gated(experts.intermediate_size) for _ in range(experts.num_experts)),
            num_per_token=experts.num_per_token,
            normalize_weights=experts.normalize_weights,
            shared=None,
        )

    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            qkv=make(config.q_size + 2 * config.kv_size, hidden, memory),
            q_norm=None,
            k_norm=None,
            attention_output=make(hidden, config.q_size, memory),
            mlp_norm=norm(),
            mlp=mlp(layer),
        )
        for layer in range(config.num_layers)
    )
    embeddings = memory.keep(torch.randn(config.vocab_size, hidden).to(BFLOAT16))
    head = make(config.vocab_size, hidden, memory)
    return DecoderWeights(embeddings, layers, norm(), head, memory.num_bytes)


def least_s(decoder: Decoder, case: StepCase) -> float:
    """Return the least CPU time of a step."""
    config = decoder.config
    batch = make_batch(case, BLOCK_SIZE)
    num_blocks = case.batch * -(-case.context // BLOCK_SIZE)
    shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, BLOCK_SIZE * config.head_dim)
    pool = torch.empty(shape, dtype=BFLOAT16).normal_()
    times = []
    for _ in range(1 + ROUNDS):
        start = time.process_time()
        decoder.forward(batch, pool)
        times.append(time.process_time() - start)
    return min(times[1:])


def main() -> None:
    """Measure and print a line for each model and form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend = NativeBackend()
    print(f"{backend.instruction_set}, one thread; prefill of 256 tokens, decodes at a context of 512")
    for name, entries in MODELS.items():
        config = config_from_hf(SHAPE | entries | {"num_hidden_layers": options.layers})
        for form, make in forms(backend):
            weights = random_weights(config, backend, make)
            decoder = Decoder(config, weights, backend)
            times = [f"{least_s(decoder, case) * 1e3:7.1f}" for case in CASES]
            print(
                f"{name:<30} {config.num_parameters / 1e6:4.0f} M, {config.num_active_parameters / 1e6:4.0f} M active  "
                f"{form:<5} {weights.num_bytes / 2**20:5.0f} MiB  prefill {times[0]} ms  "
                f"decode x 1, 4, 16: {' '.join(times[1:])} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
