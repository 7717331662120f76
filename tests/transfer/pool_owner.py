"""A process that owns a pool filled with the contract's pattern.

Told the layout, its incarnation, the link that it offers and an address of its host; prints where the pool is, then a
capability to read all of it; closes the pool at the first line on stdin, ends at the second.
"""

import sys
from contextlib import ExitStack

import msgspec
import numpy as np
from link_contract import DEADLINE_S, grant_all, pattern

from disagg.base.clock import MonotonicClock
from disagg.base.transfer_settings import KvLinkChoice, TransferSettings
from disagg.cache.layout import KvLayout
from disagg.transfer.links import SharedBlocks
from disagg.transfer.pool import KvPool


def main() -> None:
    layout_json, incarnation, kv_link, host = sys.argv[1:]
    layout = msgspec.json.decode(layout_json, type=KvLayout)
    pool = KvPool(layout, incarnation)
    np.frombuffer(pool.data, dtype=np.uint8)[:] = pattern(layout)
    with ExitStack() as stack:
        stack.callback(pool.close)
        settings = TransferSettings(kv_link=KvLinkChoice(kv_link))
        shared = SharedBlocks(pool, settings, host, MonotonicClock(), stack)
        print(shared.address.hex(), flush=True)  # noqa: T201 (stdout is how the test gets it)
        print(grant_all(shared, layout, DEADLINE_S).hex(), flush=True)  # noqa: T201
        sys.stdin.readline()
    print("closed", flush=True)  # noqa: T201
    sys.stdin.readline()


if __name__ == "__main__":
    main()
