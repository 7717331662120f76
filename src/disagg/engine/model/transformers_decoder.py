"""A decoder out of transformers' modelling code: everything but attention is theirs, attention reads the paged pool.

A step is one call of the model: its sequences stand one behind the other in one row, with their own positions, and only
attention, which is ours, knows where one ends. Source: transformers' ``AttentionInterface``.
"""

import inspect
import warnings
from collections.abc import Sequence
from typing import Any, Final

import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from disagg.base.errors import ConfigurationError, UnsupportedModelError
from disagg.engine.kernels.interface import KernelBackend, StepBatch
from disagg.engine.kernels.kv_format import write_kv
from disagg.models.foreign import ForeignModel
from disagg.models.locate import ModelFiles

_LOGIT_ROWS: Final = "logits_to_keep"


class TransformersDecoder:
    """See ``StepDecoder``. Raises UnsupportedModelError for a model that does not leave attention to others."""

    def __init__(
        self,
        files: ModelFiles,
        config: ForeignModel,
        backend: KernelBackend,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
    ) -> None:
        self.config = config
        self.backend = backend
        self.max_model_len = max_model_len
        self.device = device
        self.attention = PagedAttention(config, backend)
        self.model = _load(files, dtype, self.attention.name, device)
        self._takes_rows = _LOGIT_ROWS in inspect.signature(self.model.forward).parameters

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters; those that are tied count once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def forward(self, batch: StepBatch, kv: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """Compute one step, see ``Decoder.forward``."""
        self.attention.begin(batch, kv)
        wanted: dict[str, torch.Tensor] = {_LOGIT_ROWS: batch.logit_rows} if self._takes_rows else {}
        output = self.model(
            input_ids=batch.token_ids[None], position_ids=batch.positions.long()[None], use_cache=False, **wanted
        )
        logits: torch.Tensor = output.logits[0]
        return (logits if self._takes_rows else logits[batch.logit_rows]).contiguous()


class PagedAttention:
    """What transformers calls in the place of its attention: writes K and V of a step's tokens, then attends.

    ``seen`` has the layers of the last step, and the sliding window of each.
    """

    def __init__(self, config: ForeignModel, backend: KernelBackend) -> None:
        self._config = config
        self._backend = backend
        self.name = f"disagg_paged_{id(self):x}"
        self.seen: dict[int, int | None] = {}
        self._batch: StepBatch
        self._kv: torch.Tensor | Sequence[torch.Tensor]
        self._places: tuple[torch.Tensor, torch.Tensor]
        AttentionInterface.register(self.name, self._attend)

    def begin(self, batch: StepBatch, kv: torch.Tensor | Sequence[torch.Tensor]) -> None:
        """Take the step that the next call of the model computes."""
        self._batch, self._kv = batch, kv
        block_size = kv[0].shape[3] // self._config.head_dim
        lengths = batch.query_start.diff()
        sequences = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        positions = batch.positions.long()
        self._places = batch.block_tables[sequences, positions // block_size].long(), positions % block_size
        self.seen = {}

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend with Q [1, Hq, T, D] after K and V [1, Hk, T, D] are written; return [1, T, Hq, D]."""
        layer: int = module.layer_idx  # type: ignore[assignment]
        q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))
        self._check(layer, k, v)
        self.seen[layer] = sliding_window
        pool = self._kv[layer]
        write_kv(pool, self._backend.kv_format, k, v, *self._places)
        scale = q.shape[2] ** -0.5 if scaling is None else scaling
        out = self._backend.attention(q, pool, self._batch, scale, sliding_window, softcap)
        return out.view(1, *q.shape), None

    def _check(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        config = self._config
        expected = (config.num_kv_heads, config.head_dim)
        if not 0 <= layer < config.num_layers or tuple(k.shape[1:]) != expected or v.shape != k.shape:
            raise UnsupportedModelError(
                f"{config.class_name}: layer {layer} has keys of {list(k.shape[1:])} and values of {list(v.shape[1:])} "
                f"(heads, elements), its config.json says {config.num_layers} layers of {list(expected)}"
            )


def _load(files: ModelFiles, dtype: torch.dtype, attention: str, device: torch.device) -> Any:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    files.weight_files()  # which refuses pickled ones in words
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = AutoModelForCausalLM.from_pretrained(
                files.path,
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (ValueError, KeyError, OSError, ImportError, RuntimeError) as error:
        raise ConfigurationError(f"transformers cannot load {files.path}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()
