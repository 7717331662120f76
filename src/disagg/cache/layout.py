"""Where each byte of a KV pool is. Shared by the engine that computes and the transfer that copies."""

import enum

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.window_blocks import WindowBlocks


class KvDtype(enum.Enum):
    """Element type of the KV cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is KvDtype.FLOAT32 else 2


class KvFormat(enum.Enum):
    """Order of the elements of one head inside one block. w = 4 bytes / itemsize (1 in float32, 2 in bfloat16).

    ``INTERLEAVED`` puts K as ``[head_dim / w, block_size, w]`` and V as ``[block_size / w, head_dim, w]``: the order
    in which vector dot-product instructions (AVX-512 BF16's ``vdpbf16ps``) read both operands straight from the pool,
    without a horizontal sum in Q K^T and without packing in P V.
    ``TOKEN_MAJOR`` puts both as ``[block_size, head_dim]``: what CUDA kernels and PyTorch read.
    """

    INTERLEAVED = "interleaved"
    TOKEN_MAJOR = "token_major"


class KvLayout(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Shape of a KV pool: ``[layer, block, K or V, kv head, block_size * head_dim elements]``, contiguous.

    Layer is outermost, so that one layer of a sequence can travel while the next is computed; the head is outside the
    tokens, so that a range of heads (another tensor parallelism) is one run of bytes per block.

    A block holds ``num_layers`` of the model's layers. In a model with sliding windows these are the layers that see
    everything; the others are in blocks of their own (``window_blocks``), as many as it takes, of the same size: so any
    free block will do for either.
    """

    num_layers: int
    num_blocks: int
    num_kv_heads: int
    block_size: int
    head_dim: int
    dtype: KvDtype
    format: KvFormat
    num_window_layers: int = 0
    """Layers beside those, of which a token sees only the last ``window`` tokens, itself included."""
    window: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "num_kv_heads", "block_size", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"KV layout: {name} must be at least 1, got {getattr(self, name)}")
        if self.format is KvFormat.INTERLEAVED and (self.block_size % 2 or self.head_dim % 2):
            raise ConfigurationError(
                f"KV layout: block_size ({self.block_size}) and head_dim ({self.head_dim}) must be even"
            )
        if self.num_window_layers < 0 or bool(self.num_window_layers) != bool(self.window):
            raise ConfigurationError(
                f"KV layout: {self.num_window_layers} layers cannot have a window of {self.window}"
            )

    @property
    def window_blocks(self) -> WindowBlocks | None:
        """The blocks that hold the layers with a window; None where no layer has one."""
        return None if self.window is None else WindowBlocks(self.window, -(-self.num_window_layers // self.num_layers))

    @property
    def head_bytes(self) -> int:
        """Bytes of K (or of V) of one head in one block of one layer."""
        return self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer: K and V of all heads."""
        return 2 * self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over its layers."""
        return self.num_layers * self.layer_block_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer over all blocks: the stride from one layer to the next."""
        return self.num_blocks * self.layer_block_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole pool."""
        return self.num_layers * self.layer_bytes

    def describe(self) -> str:
        """Return in words what blocks of one pool share with those of another of which they can be made."""
        words = f"{self.num_layers} layers of {self.num_kv_heads} heads of {self.head_dim}"
        return words + (f", a window of {self.window} in {self.num_window_layers} more" if self.window else "")

    def num_blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold ``num_tokens`` tokens."""
        return -(-num_tokens // self.block_size)

    def offset(self, layer: int, block: int) -> int:
        """Return the byte offset of ``block`` of ``layer`` from the start of the pool."""
        return layer * self.layer_bytes + block * self.layer_block_bytes
