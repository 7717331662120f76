"""KV blocks on disk, past the page cache and through it: ``python benchmarks/kv_files.py --folder FOLDER``.

Writes and reads ``--blocks`` blocks of the default model's layout in bf16, digests included, and prints MB/s and CPU
seconds: written, read when no page of them is in memory, and read once more.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from disagg.base.ids import BlockHash
from disagg.cache.layout import KvDtype, KvFormat, KvLayout
from disagg.engine.disk_files import BlockFiles

LAYOUT = KvLayout(
    num_layers=30,
    num_blocks=1,
    num_kv_heads=3,
    block_size=64,
    head_dim=64,
    dtype=KvDtype.BFLOAT16,
    format=KvFormat.INTERLEAVED,
)


def timed(what: str, names: Iterable[BlockHash], call: Callable[[BlockHash], None]) -> str:
    """Call once for each name; return the MB/s and the CPU seconds of this process in words."""
    count, started_s, cpu_s = 0, time.perf_counter(), time.process_time()
    for name in names:
        call(name)
        count += 1
    seconds = time.perf_counter() - started_s
    return f"{what} {count * LAYOUT.block_bytes / seconds / 1e6:.0f} MB/s ({time.process_time() - cpu_s:.2f} s CPU)"


def let_go_of_pages(folder: Path) -> None:
    """Write all files of a folder to the disk and let the kernel drop their pages."""
    os.sync()
    for path in folder.glob("*/*.kv"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure [default: the system's for temporary files]"
    )
    parser.add_argument("--blocks", type=int, default=100)
    options = parser.parse_args()
    console = Console(highlight=False, width=120)
    names = [BlockHash(number.to_bytes(16, "big")) for number in range(options.blocks)]
    words = LAYOUT.layer_block_bytes // 8
    block = np.random.default_rng(0).integers(0, 2**63, (LAYOUT.num_layers, words), dtype=np.uint64)
    for past_page_cache in (True, False):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            files = BlockFiles(Path(folder), "bench", b"bench", LAYOUT, past_page_cache=past_page_cache)
            way = "past the page cache" if files.is_direct else "through the page cache"
            told = [timed("written", names, partial(files.write, block=block))]
            let_go_of_pages(files.folder)
            told += [timed(what, names, partial(files.read, block=block)) for what in ("read cold", "read again")]
            files.close()
        console.print(f"{way}: {', '.join(told)}")


if __name__ == "__main__":
    main()
