"""Which cached block goes first? The rule of the pool against recency: ``python benchmarks/eviction.py --traces DIR``.

Feeds the prompts of traces to one block pool, one after another, as they arrive (sessions of agents forty at a time, in
turns). Prints for pools of several sizes what part of the tokens that an endless pool finds is found.
"""

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from disagg.base.ids import BlockHash, BlockId
from disagg.cache.block_pool import BlockPool
from disagg.measure.sessions import read_sessions
from disagg.measure.trace import Trace
from disagg.simulator.simulated_requests import block_hashes

BLOCK_TOKENS = 512
"""Mooncake's; a finer one tells the same and takes longer."""
SIZES = (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)
SESSIONS_AT_ONCE = 40


class RecencyPool(BlockPool):
    """Evicts by recency alone."""

    def acquire(self, blocks: Iterable[BlockId]) -> None:
        """Hold published blocks, and leave no trace of it but their place in the order."""
        held = tuple(blocks)
        super().acquire(held)
        self._found.difference_update(held)


def mooncake(path: Path) -> Iterator[tuple[BlockHash, ...]]:
    """Yield the names of each prompt's full blocks."""
    for row in Trace(path).rows():
        yield block_hashes(row.prefix, row.prompt_len, BLOCK_TOKENS)


def agents(path: Path) -> Iterator[tuple[BlockHash, ...]]:
    """Yield those of the calls of sessions that are under way together."""
    draw = random.Random(0)
    sessions = (iter(session.calls) for session in read_sessions(path))
    under_way = list(islice(sessions, SESSIONS_AT_ONCE))
    while under_way:
        index = draw.randrange(len(under_way))
        call = next(under_way[index], None)
        if call is None:
            under_way[index : index + 1] = islice(sessions, 1)
        else:
            yield block_hashes(call.prefix, call.prompt_len, BLOCK_TOKENS)


def num_found(pool: BlockPool, prompts: Iterable[tuple[BlockHash, ...]]) -> int:
    """Return how many blocks of the prompts were in the pool when they came."""
    total = 0
    for names in prompts:
        found = pool.match_prefix(names)
        total += len(found)
        pool.acquire(found)
        taken = pool.allocate(len(names) - len(found))
        if taken is None:
            raise SystemExit(f"a prompt of {len(names)} blocks does not fit into {pool.num_blocks}")
        for index, name in zip(taken, names[len(found) :], strict=True):
            pool.publish(index, name)
        pool.release(found + taken)
    return total


def main() -> None:
    """Print a table for each trace."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--traces", type=Path, required=True, help="folder of the trace files")
    folder = parser.parse_args().traces
    table = Table(box=None, pad_edge=False)
    for heading in ("trace", "pool, tokens", "recency", "second chance"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name in ("mooncake_conversation", "mooncake_synthetic", "agent_coding_128k"):
        read = agents if name.startswith("agent") else mooncake
        prompts = list(read(folder / f"{name}.jsonl.gz"))
        most = num_found(BlockPool(sum(map(len, prompts))), prompts)
        for size in SIZES:
            found = [num_found(kind(size // BLOCK_TOKENS), prompts) for kind in (RecencyPool, BlockPool)]
            table.add_row(name, f"{size:,}", *(f"{count / most:.3f}" for count in found))
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
