"""What a simulation costs: by changes, not by tokens, and no memory for what is over."""

import gc
import tracemalloc
from collections.abc import Iterator

import pytest
from simulated import pair, poisson

from disagg.base.ids import RequestId
from disagg.scheduling import epoch_memory
from disagg.simulator.cluster import SimulatedCluster
from disagg.simulator.recording import Recording
from disagg.simulator.request import SimulatedRequest


def num_calls(output_len: int, *, step_by_step: bool = False) -> int:
    cluster = SimulatedCluster(pair(), lambda request: None, Recording(step_by_step=step_by_step))
    cluster.run(poisson(rate=1, count=50, seed=8, output=(output_len, output_len)))
    return cluster.queue.num_run


def test_longer_answers_cost_no_more_calls() -> None:
    assert num_calls(output_len=60) == pytest.approx(num_calls(output_len=30), rel=0.1)
    assert num_calls(output_len=60, step_by_step=True) > 3 * num_calls(output_len=60)


def stream(count: int) -> Iterator[SimulatedRequest]:
    return (SimulatedRequest(RequestId(f"r{number}"), number * 0.05, 100, 20) for number in range(count))


def peak_bytes(count: int) -> int:
    """Most memory in use at once while this many requests come from a generator, after others to warm up.

    The warming fills the lists in which msgspec and Python keep freed structs and tuples for the next ones. The
    collector of cycles would empty them.
    """
    gc.disable()
    try:
        SimulatedCluster(pair(), lambda request: None).run(stream(2000))
        cluster = SimulatedCluster(pair(), lambda request: None)
        tracemalloc.start()
        cluster.run(stream(count))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.enable()


def test_memory_does_not_grow_with_the_length_of_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    # Schedulers remember 8,192 to 16,384 requests that ended; the rest must be flat.
    monkeypatch.setattr(epoch_memory, "CAPACITY", 50)
    # From 64 s on the course of the KV pools has all its points.
    assert peak_bytes(2500) < 1.4 * peak_bytes(1250)


def test_a_run_leaves_the_collector_of_cycles_as_it_was() -> None:
    before = gc.get_threshold()
    seen: list[tuple[int, int, int]] = []
    SimulatedCluster(pair(), lambda request: seen.append(gc.get_threshold())).run(stream(1))
    assert seen != [before]
    assert gc.get_threshold() == before
