"""How fast one instance pulls KV blocks from another one on the same host: ``python benchmarks/kv_pull.py``.

Prints GB/s for the pool of SmolLM2-135M in bfloat16 (24 KB per block and layer, 30 layers), for blocks that lie beside
each other and for scattered ones; the first pull of a block also maps its pages, later ones do not.
"""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np

from disagg.base.clock import MonotonicClock
from disagg.base.ids import BlockId
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.transfer.link import BlockPair, Link, Transfer
from disagg.transfer.links import Links
from disagg.transfer.pool import KvPool

LAYOUT = KvLayout(
    num_layers=30,
    num_blocks=1400,
    num_kv_heads=3,
    block_size=32,
    head_dim=64,
    dtype=KvDtype.BFLOAT16,
    format=KvFormat.INTERLEAVED,
)
NUM_PULLS = 12


def own_pool(pipe: Connection) -> None:
    """The other process: fill a pool, say where it is, keep it until told to end."""
    pool = KvPool(LAYOUT, "aa")
    pool.blocks[:] = 7
    pipe.send_bytes(pool.address())
    pipe.recv_bytes()
    pool.close()


def pull(link: Link, blocks: list[BlockPair]) -> float:
    """Return the GB/s of one pull of all layers."""
    ended = threading.Event()

    def on_end(_: Transfer) -> None:
        ended.set()

    transfer = link.read(blocks, range(LAYOUT.num_layers), on_end)
    ended.wait()
    return transfer.num_bytes / (transfer.ended_s - transfer.started_s) / 1e9


def memory_copy() -> float:
    """Return the GB/s of a plain copy of as many bytes as a pull of 32 blocks has."""
    clock = MonotonicClock()
    source = np.ones(32 * LAYOUT.block_bytes // 8)
    target = np.zeros_like(source)
    speeds = []
    for _ in range(NUM_PULLS):
        started_s = clock.now()
        np.copyto(target, source)
        speeds.append(source.nbytes / (clock.now() - started_s) / 1e9)
    return float(np.median(speeds))


def main() -> None:
    """Measure and print."""
    pipe, other_end = multiprocessing.Pipe()
    owner = multiprocessing.get_context("spawn").Process(target=own_pool, args=(other_end,))
    owner.start()
    address = pipe.recv_bytes()
    pool = KvPool(LAYOUT, "bb")
    for layer in range(LAYOUT.num_layers):
        pool.touch(layer, 0, LAYOUT.num_blocks)
    scattered = np.random.default_rng(0).permutation(LAYOUT.num_blocks // 2) + LAYOUT.num_blocks // 2
    print(f"plain copy of {32 * LAYOUT.block_bytes / 1e6:.1f} MB: {memory_copy():.1f} GB/s")
    with ThreadPoolExecutor(max_workers=1) as thread:
        link = Links(pool, thread, MonotonicClock()).open(address)
        for kind, ids in (("neighbours", np.arange(LAYOUT.num_blocks // 2)), ("scattered", scattered)):
            groups = ids[: NUM_PULLS * 32].reshape(NUM_PULLS, 32).tolist()
            for time in ("first", "later"):
                speeds = [pull(link, [(BlockId(n), BlockId(n)) for n in group]) for group in groups]
                print(f"32 blocks, {kind}, {time} time: {np.median(speeds):.1f} GB/s (worst {min(speeds):.1f})")
    pipe.send_bytes(b"end")
    owner.join()
    pool.close()


if __name__ == "__main__":
    main()
