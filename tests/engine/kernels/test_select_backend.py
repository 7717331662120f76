"""Which backend an instance gets, and what it is told about it."""

import logging

import pytest
import torch

from disagg.base.errors import ConfigurationError
from disagg.cache.layout import KvFormat
from disagg.engine.kernels import native_backend
from disagg.engine.kernels.select import select_backend

CPU = torch.device("cpu")


@pytest.fixture
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "_import_error", ImportError("no module named _native"))


def test_the_native_backend_comes_first_on_cpu() -> None:
    reason = native_backend.native_unavailable_reason(CPU, torch.bfloat16)
    assert select_backend(CPU, torch.bfloat16).name == ("torch" if reason else "native")


def test_a_backend_can_be_named() -> None:
    backend = select_backend(CPU, torch.float32, "torch")
    assert (backend.name, backend.kv_format) == ("torch", KvFormat.TOKEN_MAJOR)


@pytest.mark.usefixtures("without_native")
def test_the_slow_way_is_said_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert select_backend(CPU, torch.float32).name == "torch"
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "install a C++ compiler and reinstall" in record.getMessage()


@pytest.mark.usefixtures("without_native")
def test_a_named_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="native kernels cannot be used: they were not built"):
        select_backend(CPU, torch.float32, "native")


def test_what_the_kernels_have_not_falls_back() -> None:
    assert select_backend(CPU, torch.float64).name == "torch"


@pytest.mark.parametrize(("head_dim", "block_size"), [(72, 32), (272, 32), (64, 8), (64, 48)])
def test_a_shape_without_native_kernel_falls_back(head_dim: int, block_size: int) -> None:
    backend = select_backend(CPU, torch.float32, head_dim=head_dim, block_size=block_size)
    assert backend.name == "torch"


def test_cuda_reads_token_major_blocks() -> None:
    backend = select_backend(torch.device("cuda"), torch.bfloat16)
    assert (backend.name, backend.kv_format) == ("torch", KvFormat.TOKEN_MAJOR)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'triton'; there are native, torch"):
        select_backend(CPU, torch.float32, "triton")
