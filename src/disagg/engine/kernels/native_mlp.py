"""The MLP of a layer in the form in which the native decoder calls it."""

from typing import TYPE_CHECKING

from disagg.base.errors import InternalError
from disagg.engine.kernels.interface import DenseMlp, Linear, Mlp
from disagg.engine.kernels.native_linear import PackedLinear
from disagg.models.config import Activation

if TYPE_CHECKING:
    from disagg.engine.kernels import _native


def native_mlp(mlp: Mlp) -> "_native.Mlp":
    """Return the native form of ``mlp``, of whose weights it knows only the addresses."""
    from disagg.engine.kernels import _native  # not built everywhere

    if isinstance(mlp, DenseMlp):
        return _dense(mlp)
    return _native.SparseMlp(
        router=native_linear(mlp.router),
        experts=[_dense(expert) for expert in mlp.experts],
        shared=None if mlp.shared is None else _dense(mlp.shared),
        num_per_token=mlp.num_per_token,
        normalize_weights=mlp.normalize_weights,
    )


def native_linear(linear: Linear) -> "_native.Linear":
    """Return the native form of a packed projection."""
    if not isinstance(linear, PackedLinear):
        raise InternalError(f"a native decoder needs packed weights, got {type(linear).__name__}")
    return linear.native


def native_activation(activation: Activation) -> "_native.Activation":
    """Return the native name of what a gate goes through."""
    from disagg.engine.kernels import _native

    return {
        Activation.SILU: _native.Activation.SILU,
        Activation.GELU_TANH: _native.Activation.GELU_TANH,
    }[activation]


def _dense(mlp: DenseMlp) -> "_native.DenseMlp":
    from disagg.engine.kernels import _native

    return _native.DenseMlp(
        gate_up=native_linear(mlp.gate_up), down=native_linear(mlp.down), activation=native_activation(mlp.activation)
    )
