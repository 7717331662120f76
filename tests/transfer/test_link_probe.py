"""How fast a link is said to be, from times that a test chooses."""

from collections.abc import Callable

import pytest

from disagg.costs.links import LinkKind
from disagg.transfer.link import KvRead, Transfer
from disagg.transfer.link_probe import measure_link


class TimedLink:
    """Takes as long for a read of so many bytes as it is told, by a clock of its own."""

    kind = LinkKind.SHM

    def __init__(self, time_of: Callable[[int], float]) -> None:
        self.time_s = 0.0
        self._time_of = time_of

    def now(self) -> float:
        return self.time_s

    def probe(self, target: memoryview, access: bytes) -> None:
        self.time_s += self._time_of(len(target))

    def read(self, read: KvRead, on_end: Callable[[Transfer], None]) -> Transfer:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def test_the_time_to_the_first_byte_is_no_part_of_the_speed() -> None:
    link = TimedLink(lambda num_bytes: 0.001 + num_bytes / 1e9)
    figure = measure_link(link, b"", "", link)
    assert figure.latency_s == pytest.approx(0.001, rel=1e-4)
    assert figure.bytes_per_s == pytest.approx(1e9, rel=1e-4)


def test_a_machine_too_busy_to_tell_the_two_apart_gives_a_speed_that_can_be() -> None:
    link = TimedLink(lambda num_bytes: 0.010 if num_bytes < 100 else 0.008)
    figure = measure_link(link, b"", "", link)
    assert figure.bytes_per_s <= 2 * (32 << 20) / 0.008
