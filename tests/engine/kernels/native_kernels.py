"""The native backend, at every instruction set of this processor: its tests are skipped where it was not built."""

import pytest
import torch
from hypothesis import strategies as st

native = pytest.importorskip("disagg.engine.kernels.native_backend")
if native.native_unavailable_reason(torch.device("cpu"), torch.float32) is not None:
    pytest.skip("the native kernels were not built", allow_module_level=True)

BACKENDS = {name: native.NativeBackend(name) for name in native.instruction_sets()}
FASTEST = next(iter(BACKENDS.values()))
backends = st.sampled_from(list(BACKENDS))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
