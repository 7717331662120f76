"""Types of the extension that setup.py builds from native/; addresses are what ``Tensor.data_ptr`` returns."""

import enum

def use_openmp(path: str) -> bool: ...
def instruction_sets() -> list[str]: ...

class Activation(enum.Enum):
    SILU = ...
    GELU_TANH = ...

class ElementType(enum.Enum):
    FLOAT32 = ...
    BFLOAT16 = ...
    FLOAT16 = ...

class Step:
    def __init__(
        self,
        *,
        num_blocks: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        block_size: int,
        query_start: int,
        context_lens: int,
        block_tables: int,
        num_rows: int,
        num_sequences: int,
        table_width: int,
    ) -> None: ...

class DrawSettings:
    def __init__(
        self, *, temperature: int, top_p: int, min_p: int, top_k: int, seed: int, position: int, floor: float
    ) -> None: ...

class Kernels:
    def __init__(self, instruction_set: str, element: ElementType) -> None: ...
    def rms_norm(
        self,
        x: int,
        residual: int,
        x_norm: int,
        norm: int,
        out: int,
        rows: int,
        width: int,
        multiplier: float,
        eps: float,
        num_threads: int,
    ) -> None: ...
    def gate(self, activation: Activation, gate_up: int, out: int, rows: int, width: int, num_threads: int) -> None: ...
    def scale_and_cap(self, x: int, rows: int, width: int, scale: float, cap: float, num_threads: int) -> None: ...
    def rope_and_write_kv(
        self,
        step: Step,
        qkv: int,
        q_out: int,
        kv_layer: int,
        cos_sin: int,
        num_positions: int,
        rotary_dim: int,
        q_norm: int,
        k_norm: int,
        norm_rows: bool,
        eps: float,
        num_threads: int,
    ) -> None: ...
    def attention(
        self, step: Step, q: int, out: int, kv_layer: int, scale: float, softcap: float, window: int, num_threads: int
    ) -> None: ...
    def find_largest(self, logits: int, tokens: int, rows: int, width: int, num_threads: int) -> None: ...
    def draw(
        self, logits: int, settings: DrawSettings, tokens: int, rows: int, width: int, num_threads: int
    ) -> None: ...
    def forbid(self, logits: int, allowed: int, numbers: int, count: int, width: int, num_threads: int) -> None: ...

class BlockFormat: ...

class Linear:
    def __init__(
        self,
        kernels: Kernels,
        out_features: int,
        in_features: int,
        scale: list[float],
        bias: list[float],
        blocks: BlockFormat | None = None,
    ) -> None: ...
    def packed_bytes(self) -> int: ...
    def pack(self, weight: int, packed: int, num_threads: int) -> None: ...
    def pack_blocks(
        self, *, values: int, scale: int, offset: int, sub_scale: int, sub_offset: int, packed: int, num_threads: int
    ) -> None: ...
    def use_packed(self, packed: int) -> None: ...
    def multiply(self, x: int, out: int, rows: int, num_threads: int) -> None: ...

class Mlp: ...

class DenseMlp(Mlp):
    def __init__(self, *, gate_up: Linear, down: Linear, activation: Activation) -> None: ...

class SparseMlp(Mlp):
    def __init__(
        self,
        *,
        router: Linear,
        experts: list[DenseMlp],
        shared: DenseMlp | None,
        num_per_token: int,
        normalize_weights: bool,
    ) -> None: ...

class Decoder:
    def __init__(
        self,
        *,
        kernels: Kernels,
        hidden: int,
        vocab_size: int,
        embeddings: int,
        norm: int,
        head: Linear,
        num_positions: int,
        rotary_dim: int,
        norm_rows: bool,
        eps: float,
        scale: float,
        attention_softcap: float,
        residual_multiplier: float,
        logit_scale: float,
        logit_softcap: float,
    ) -> None: ...
    def add(
        self,
        *,
        attention_norm: int,
        qkv: Linear,
        q_norm: int,
        k_norm: int,
        attention_output: Linear,
        attention_output_norm: int,
        mlp_norm: int,
        mlp: Mlp,
        mlp_output_norm: int,
        cos_sin: int,
        window: int,
    ) -> None: ...
    def run(
        self,
        *,
        steps: list[Step],
        token_ids: int,
        kv_layers: list[int],
        wanted_rows: int,
        num_wanted: int,
        logits: int,
        largest: int,
        progress: int,
        num_threads: int,
        helpers: Helpers | None,
    ) -> None: ...

CORE_CELL_BYTES: int

class CoreBoard:
    def __init__(self, cells: int, own: list[int]) -> None: ...
    def take_back(self) -> None: ...
    def lend(self) -> None: ...

class Helpers:
    def __init__(self, board: CoreBoard, cores: list[int]) -> None: ...
    def allow(self, number: int) -> None: ...
    def take_seconds(self) -> float: ...
