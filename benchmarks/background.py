"""What the benchmarks look at while something runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(look: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``look`` on a thread of its own, now and every so many seconds, while the block runs."""
    is_over = threading.Event()

    def keep_looking() -> None:
        while not is_over.is_set():
            look()
            is_over.wait(every_s)

    thread = threading.Thread(target=keep_looking, name="background")
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
