"""A process that owns a pool filled with the contract's pattern: prints its address, ends when stdin does."""

import sys

import msgspec
import numpy as np
from link_contract import pattern

from disagg.cache.layout import KvLayout
from disagg.transfer.pool import KvPool


def main() -> None:
    layout = msgspec.json.decode(sys.argv[1], type=KvLayout)
    pool = KvPool(layout, sys.argv[2])
    np.frombuffer(pool.data, dtype=np.uint8)[:] = pattern(layout)
    print(pool.address().hex(), flush=True)  # noqa: T201 (stdout is how the test gets it)
    sys.stdin.readline()
    pool.close()
    print("closed", flush=True)  # noqa: T201
    sys.stdin.readline()


if __name__ == "__main__":
    main()
