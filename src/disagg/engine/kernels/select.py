"""Choosing the kernel backend of an instance."""

import logging
from typing import TYPE_CHECKING, Final

import torch

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import known_names
from disagg.cache.layout import KvFormat
from disagg.engine.kernels.interface import KernelBackend
from disagg.engine.kernels.native_backend import NativeBackend, native_unavailable_reason
from disagg.engine.kernels.torch_backend import TorchBackend

if TYPE_CHECKING:
    from disagg.engine.kernels import _native

BACKENDS: Final = ("native", "torch")

_logger = logging.getLogger(__name__)


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    name: str | None = None,
    *,
    head_dim: int | None = None,
    block_size: int | None = None,
    helpers: "_native.Helpers | None" = None,
) -> KernelBackend:
    """Return the fastest backend for ``device`` and ``dtype``, or the one called ``name``.

    Give the model's head dimension and the pool's block size where they are known: not every backend takes all. The
    native one lets ``helpers`` compute too. Says in the log which one it is, and why when it is not the fast one.
    Raises ConfigurationError when ``name`` is unknown or cannot run here.
    """
    if name not in (None, *BACKENDS):
        raise ConfigurationError(f"no kernel backend is called {name!r}; {known_names(name, BACKENDS)}")
    obstacle = native_unavailable_reason(device, dtype, head_dim, block_size)
    if name == "native" and obstacle is not None:
        raise ConfigurationError(f"the native kernels cannot be used: {obstacle}")
    if name != "torch" and obstacle is None:
        backend = NativeBackend(helpers=helpers)
        _logger.info("kernels: native (%s)", backend.instruction_set)
        return backend
    if name is None and device.type == "cpu":
        _logger.warning("kernels: PyTorch, several times slower than the native ones, because %s", obstacle)
    else:
        _logger.info("kernels: PyTorch on %s", device)
    return TorchBackend(KvFormat.TOKEN_MAJOR)
