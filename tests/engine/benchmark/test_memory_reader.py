"""How fast cores read memory: something plausible, without moving or slowing the thread that asks."""

import os

import torch

from disagg.engine.benchmark.memory_reader import MemoryReader


def test_cores_are_read_on_by_threads_of_their_own() -> None:
    cores, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    reader = MemoryReader(sorted(cores)[:2])
    for _ in range(2):
        assert 1e8 < reader.bytes_per_s() < 1e13
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == (cores, num_threads)
