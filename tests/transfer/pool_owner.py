"""A process that owns a pool filled with the contract's pattern.

Told the layout and its incarnation; prints where the pool is, then a capability to read all of it; closes the pool at
the first line on stdin, ends at the second.
"""

import sys
from contextlib import ExitStack

import msgspec
import numpy as np
from link_contract import DEADLINE_S, grant_all, pattern

from disagg.base.clock import MonotonicClock
from disagg.base.config import TransferSettings
from disagg.cache.layout import KvLayout
from disagg.transfer.pool import KvPool
from disagg.transfer.shared_blocks import SharedBlocks


def main() -> None:
    layout = msgspec.json.decode(sys.argv[1], type=KvLayout)
    pool = KvPool(layout, sys.argv[2])
    np.frombuffer(pool.data, dtype=np.uint8)[:] = pattern(layout)
    with ExitStack() as stack:
        stack.callback(pool.close)
        shared = SharedBlocks(pool, TransferSettings(), None, MonotonicClock(), stack)
        print(shared.address.hex(), flush=True)  # noqa: T201 (stdout is how the test gets it)
        print(grant_all(shared, layout, DEADLINE_S).hex(), flush=True)  # noqa: T201
        sys.stdin.readline()
    print("closed", flush=True)  # noqa: T201
    sys.stdin.readline()


if __name__ == "__main__":
    main()
