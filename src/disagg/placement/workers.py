"""Processes that simulate side by side. Results come in the order of the jobs, whoever was first."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.pool import Pool
from typing import TypeVar

J = TypeVar("J")
R = TypeVar("R")


class Workers:
    """Runs jobs in processes of its own, or in this one where there is one core or one job."""

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: Pool | None = None

    def map(self, function: Callable[[J], R], jobs: Sequence[J]) -> Iterator[R]:
        """Yield ``function`` of each job, in their order. What it raises is raised here."""
        if self._num_workers == 1 or len(jobs) == 1:
            yield from map(function, jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(self._num_workers, initializer=_ignore_interrupts)
        yield from self._pool.imap(function, jobs)

    def close(self) -> None:
        """End all processes, at once."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


@contextmanager
def open_workers(num_workers: int | None = None) -> Iterator[Workers]:
    """Give workers, one for each core that this process may use unless said, and end them afterwards."""
    workers = Workers(num_workers or len(os.sched_getaffinity(0)))
    try:
        yield workers
    finally:
        workers.close()


def _ignore_interrupts() -> None:
    """Ctrl-C goes to the whole process group; who started the workers decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
