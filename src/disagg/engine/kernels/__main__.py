"""``python -m disagg.engine.kernels``: say which kernels this installation computes with on the CPU.

With ``--require-native`` the exit status is 1 when the native ones were not built, so that a build that failed in
silence (they are optional) is noticed.
"""

import sys

import torch

from disagg.engine.kernels.native_backend import NativeBackend, native_unavailable_reason


def main(arguments: list[str]) -> int:
    """Print one line; return the exit status."""
    reason = native_unavailable_reason(torch.device("cpu"), torch.bfloat16)
    if reason is None:
        sys.stdout.write(f"disagg: native kernels ({NativeBackend().instruction_set})\n")
        return 0
    sys.stdout.write(f"disagg: PyTorch kernels, several times slower than the native ones: {reason}\n")
    return 1 if "--require-native" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
