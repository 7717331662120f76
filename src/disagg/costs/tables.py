"""Latency from measured operator times: a layer is the sum of its operators, a step the sum of its layers.

Counted per layer: four matrix products, attention, two all-reduces under tensor parallelism, and the bytes that norms,
rotation, activation and residuals move. Not counted: the host, and what overlaps. A step's prompts are taken as one
kernel over the sum of their squared lengths, its decodes as a batch of equal contexts.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from disagg.base.errors import ConfigurationError
from disagg.costs.devices import DeviceSheet
from disagg.costs.fit import FitError
from disagg.costs.latency import StepShape
from disagg.costs.links import InstanceLinks, LinkModel
from disagg.costs.operator_tables import (
    ALL_REDUCE_COLUMNS,
    ATTENTION_COLUMNS,
    GEMM_COLUMNS,
    AllReduceTable,
    AttentionTable,
    Curve,
    MatmulTable,
    read_rows,
)
from disagg.costs.sheet_platform import SheetPlatform, split_layers
from disagg.models.shape import ModelShape

_ELEMENTWISE_KERNELS: Final = 5
_ELEMENTWISE_PASSES: Final = 10
"""Reads and writes of a token's hidden vector by these kernels."""


class TableLatency:
    """One instance; the curves it needs are made once."""

    def __init__(
        self,
        tables: "OperatorTables",
        config: ModelShape,
        tensor_parallel: int,
        num_stages: int,
        stage_links: tuple[LinkModel, ...],
    ) -> None:
        self.num_stages = num_stages
        self._config = config
        self._device = tables.device
        self._stage_links = stage_links
        self._layers = split_layers(config.num_layers, num_stages)
        heads, kv_heads = config.num_heads // tensor_parallel, max(1, config.num_kv_heads // tensor_parallel)
        hidden = config.hidden_size
        widths = (
            ((heads + 2 * kv_heads) * config.head_dim, hidden),
            (hidden, heads * config.head_dim),
            (config.mlp_input_size // tensor_parallel, hidden),
            (hidden, config.intermediate_size // tensor_parallel),
        )
        self._matmuls = [tables.matmul.curve(n, k) for n, k in widths]
        self._logits = tables.matmul.curve(config.vocab_size // tensor_parallel, hidden)
        self._prefill = tables.attention.prefill_curve(heads, kv_heads)
        self._decode = tables.attention.decode(heads, kv_heads)
        self._all_reduce: Curve | None = tables.all_reduce.curve(tensor_parallel) if tensor_parallel > 1 else None

    def stage_times_s(self, shape: StepShape) -> tuple[float, ...]:
        """See ``LatencyModel``."""
        layer_s = self._layer_s(shape)
        times = [layer_s * num_layers for num_layers in self._layers]
        for stage, link in enumerate(self._stage_links):
            times[stage] += link.transfer_time_s(shape.num_tokens * self._config.hidden_size * 2)
        times[-1] += self._logits(shape.num_samples)
        return tuple(times)

    def _layer_s(self, shape: StepShape) -> float:
        num_tokens = shape.num_tokens
        seconds = sum(curve(num_tokens) for curve in self._matmuls)
        seconds += self._prefill(shape.prefill_squares)
        if shape.num_decodes:
            seconds += self._decode(shape.num_decodes, shape.decode_context / shape.num_decodes)
        if self._all_reduce is not None:
            seconds += 2 * self._all_reduce(num_tokens * self._config.hidden_size)
        moved_bytes = _ELEMENTWISE_PASSES * num_tokens * self._config.hidden_size * 2
        return (
            seconds
            + _ELEMENTWISE_KERNELS * self._device.kernel_s
            + moved_bytes / (self._device.memory_bytes_per_s * self._device.weights_share)
        )


@dataclass(frozen=True)
class OperatorTables:
    """All tables of one GPU."""

    device: DeviceSheet
    matmul: MatmulTable
    attention: AttentionTable
    all_reduce: AllReduceTable

    @classmethod
    def read(cls, folder: Path, prefix: str, device: DeviceSheet) -> "OperatorTables":
        """Read the files of ``folder`` whose names begin with ``prefix``, such as ``a100_sxm``."""
        return cls(
            device=device,
            matmul=MatmulTable(read_rows(folder, f"{prefix}.*gemm_bf16*.csv", GEMM_COLUMNS)),
            attention=AttentionTable(
                read_rows(folder, f"{prefix}.*context_attention_bf16*.csv", ATTENTION_COLUMNS),
                read_rows(folder, f"{prefix}.*generation_attention_bf16*.csv", ATTENTION_COLUMNS),
            ),
            all_reduce=AllReduceTable(read_rows(folder, f"{prefix}.*allreduce_bf16*.csv", ALL_REDUCE_COLUMNS)),
        )

    def errors(self) -> dict[str, FitError]:
        """Return, for each operator, how far neighbours are from predicting a measured point."""
        return {"matmul": self.matmul.error(), "attention": self.attention.error()}


@dataclass(frozen=True)
class TablePlatform(SheetPlatform):
    """A model on a GPU with operator tables, in bf16 with heads of 128: see ``on``."""

    tables: OperatorTables = field(kw_only=True)

    @classmethod
    def on(cls, tables: OperatorTables, config: ModelShape, model: str) -> "TablePlatform":
        """Return the model on the tables' GPU; raise ConfigurationError when its operators were not measured."""
        if config.head_dim != 128:
            raise ConfigurationError(
                f"the attention tables are for heads of 128, those of {model} have {config.head_dim}: use the roofline"
            )
        if config.layer_experts:
            raise ConfigurationError(
                f"the operator tables have no grouped products, and {model} is a mixture of experts: use the roofline"
            )
        return cls(config, tables.device, model, tables=tables)

    @property
    def name(self) -> str:
        """See ``Platform``."""
        return f"{self.model} on {self.device.name}, measured operators"

    def latency(self, tensor_parallel: int, pipeline_parallel: int, links: InstanceLinks | None = None) -> TableLatency:
        """See ``SheetPlatform``; all-reduces are as measured, over the links of the tables."""
        links = self.instance_links(tensor_parallel, pipeline_parallel, links)
        return TableLatency(self.tables, self.config, tensor_parallel, pipeline_parallel, links.stages)
