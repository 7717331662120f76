"""How fast one instance pulls KV blocks from another one on the same host: ``python benchmarks/kv_pull.py``.

Prints GB/s for the pool of SmolLM2-135M in bfloat16 (24 KB per block and layer, 30 layers), for blocks that lie beside
each other and for scattered ones, and of the same copies where the pages of the peer's pool are not mapped yet.
"""

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

import numpy as np

from disagg.base.clock import MonotonicClock
from disagg.base.ids import BlockId
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.transfer.address import decode_address
from disagg.transfer.link import BlockPair, Link, Transfer
from disagg.transfer.links import Links
from disagg.transfer.page_toucher import wait_until_touched
from disagg.transfer.peer_pool import PeerPool
from disagg.transfer.pool import KvPool
from disagg.transfer.shm_link import runs

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


def copy(peer: PeerPool, pool: KvPool, blocks: list[BlockPair]) -> float:
    """Return the GB/s of the copies that a pull makes, out of a mapping of our own."""
    clock = MonotonicClock()
    started_s = clock.now()
    for source, target, count in runs(blocks, longest=len(blocks)):
        np.copyto(pool.blocks[:, target : target + count], peer.blocks[:, source : source + count])
    return len(blocks) * LAYOUT.block_bytes / (clock.now() - started_s) / 1e9


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
    unmapped = PeerPool(decode_address(address))
    with ThreadPoolExecutor(max_workers=1) as thread:
        link = Links(pool, thread, MonotonicClock(), maps_ahead=True).open(address)
        wait_until_touched(timeout_s=60.0)
        for kind, ids in (("neighbours", np.arange(LAYOUT.num_blocks // 2)), ("scattered", scattered)):
            groups = [
                [(BlockId(n), BlockId(n)) for n in group]
                for group in ids[: NUM_PULLS * 32].reshape(NUM_PULLS, 32).tolist()
            ]
            for pages, speeds in (
                ("mapped", [pull(link, blocks) for blocks in groups]),
                ("not mapped", [copy(unmapped, pool, blocks) for blocks in groups]),
            ):
                print(f"32 blocks, {kind}, pages {pages}: {np.median(speeds):.1f} GB/s (worst {min(speeds):.1f})")
    pipe.send_bytes(b"end")
    owner.join()
    pool.close()


if __name__ == "__main__":
    main()
