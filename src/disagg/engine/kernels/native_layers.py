"""All layers of a decoder as one call of the native kernels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch

from disagg.base.errors import InternalError
from disagg.engine.kernels.interface import LayerSettings, LayerWeights, StepBatch
from disagg.engine.kernels.native_linear import PackedLinear, check_tensor

if TYPE_CHECKING:
    from disagg.engine.kernels import _native

    PrepareStep = Callable[[StepBatch, torch.Tensor, int, int], _native.Step]

NO_WINDOW: Final = 2**31 - 1


class NativeLayers:
    """See ``DecoderLayers``. ``native`` is empty yet; ``prepare_step`` gives a batch in its native form."""

    def __init__(
        self,
        native: "_native.Layers",
        layers: Sequence[LayerWeights],
        settings: LayerSettings,
        prepare_step: "PrepareStep",
    ) -> None:
        self._native = native
        self._layers = tuple(layers)  # the native side knows addresses only
        self._settings = settings
        self._prepare_step = prepare_step
        self._hidden = len(layers[0].attention_norm)
        self._dtype = layers[0].attention_norm.dtype
        for layer, window in zip(layers, settings.sliding_windows, strict=True):
            self._add(layer, NO_WINDOW if window is None else window)

    def __call__(
        self, residual: torch.Tensor, kv: torch.Tensor | Sequence[torch.Tensor], batch: StepBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderLayers``."""
        settings, wanted = self._settings, batch.logit_rows
        rows, num_wanted = len(batch.token_ids), len(wanted)
        step = self._prepare_step(batch, kv[0], settings.num_heads, settings.cos_sin.shape[1])
        check_tensor(residual, self._dtype, rows * self._hidden)
        check_tensor(wanted, torch.int64, num_wanted)
        kept, out = residual.new_empty((2, num_wanted, self._hidden)).unbind()
        try:
            self._native.run(
                step=step,
                residual=residual.data_ptr(),
                kv_layers=self._addresses(kv),
                wanted_rows=wanted.data_ptr(),
                num_wanted=num_wanted,
                wanted_residual=kept.data_ptr(),
                out=out.data_ptr(),
                num_threads=torch.get_num_threads(),
            )
        except (IndexError, ValueError) as error:
            raise InternalError(f"step refused: {error}") from error
        return out, kept

    def _addresses(self, kv: torch.Tensor | Sequence[torch.Tensor]) -> list[int]:
        """Return where each layer's pool is; all must be like the first."""
        first = kv[0]
        check_tensor(first, self._dtype, first.numel())
        if isinstance(kv, torch.Tensor):
            check_tensor(kv, self._dtype, len(self._layers) * first.numel())
            start, step = kv.data_ptr(), first.numel() * first.element_size()
            return [start + index * step for index in range(len(kv))]
        for layer in kv:
            check_tensor(layer, self._dtype, first.numel())
        return [layer.data_ptr() for layer in kv]

    def _add(self, layer: LayerWeights, window: int) -> None:
        linears = [layer.qkv, layer.attention_output, layer.gate_up, layer.down]
        qkv, attention_output, gate_up, down = (linear for linear in linears if isinstance(linear, PackedLinear))
        head_dim = self._settings.cos_sin.shape[1]
        for norm, width in (
            (layer.attention_norm, self._hidden),
            (layer.mlp_norm, self._hidden),
            (layer.q_norm, head_dim),
            (layer.k_norm, head_dim),
        ):
            if norm is not None:
                check_tensor(norm, self._dtype, width)
        self._native.add(
            attention_norm=layer.attention_norm.data_ptr(),
            qkv=qkv.native,
            q_norm=0 if layer.q_norm is None else layer.q_norm.data_ptr(),
            k_norm=0 if layer.k_norm is None else layer.k_norm.data_ptr(),
            attention_output=attention_output.native,
            mlp_norm=layer.mlp_norm.data_ptr(),
            gate_up=gate_up.native,
            down=down.native,
            window=window,
        )
