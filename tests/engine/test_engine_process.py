"""``python -m disagg.engine`` as a real process: how it starts, serves, hands over and ends."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
from cluster import RouterEnd, continuation, request

from disagg.base.config import CacheSettings, DType, InstanceSettings, ModelSettings, SchedulerSettings
from disagg.base.ids import Epoch, InstanceId
from disagg.base.messages import Adopt, Generate, Loading, Offered, Pulled, Ready, Stop
from disagg.base.request import GenerationRequest, Role
from disagg.models.locate import ModelFiles

END_DEADLINE_S = 30.0


@pytest.fixture
def router() -> Iterator[RouterEnd]:
    router = RouterEnd()
    yield router
    router.close()


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama", vocab_size=1000))


class EngineProcess:
    """One instance in a process of its own, told by keyword what differs from the usual settings."""

    def __init__(self, router: RouterEnd, name: str, folder: str, **changes: Any) -> None:
        self.router = router
        self.name = name
        settings = InstanceSettings(
            instance=InstanceId(name),
            role=Role.COLOCATED,
            control_endpoint=router.endpoint,
            model=ModelSettings(model=folder, dtype=DType.FLOAT32),
            cache=CacheSettings(kv_memory_bytes=16 << 20, block_size=16),
            scheduler=SchedulerSettings(max_batch_tokens=64),
        )
        self.process = start(msgspec.json.encode(msgspec.structs.replace(settings, **changes)))

    def __enter__(self) -> Self:
        try:
            self.ready = self.router.expect(Ready, self.name)
        except BaseException:
            self.process.kill()
            raise AssertionError(f"{self.name} did not get ready:\n{self.wait()[1]}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate(timeout=END_DEADLINE_S)

    def send(self, *messages: Any) -> None:
        self.router.send(self.name, *messages)

    def wait(self) -> tuple[int, str]:
        """Return exit status and error output."""
        _, errors = self.process.communicate(timeout=END_DEADLINE_S)
        return self.process.returncode, errors.decode()


def start(settings: bytes) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-m", "disagg.engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(settings)
    process.stdin.close()
    process.stdin = None
    return process


def greedy(name: str, num_tokens: int, **fields: Any) -> GenerationRequest:
    return request(name, num_tokens, temperature=0.0, **fields)


def test_it_loads_serves_and_stops(router: RouterEnd, model: str) -> None:
    with EngineProcess(router, "colocated-0", model, parent_pid=os.getpid()) as engine:
        facts = engine.ready.facts
        assert (engine.ready.role, facts.pid, facts.vocab_size) == (Role.COLOCATED, engine.process.pid, 1000)
        assert facts.max_model_len == 512
        assert facts.kv_bytes <= 16 << 20
        stages = [loading.stage for loading in router.all(Loading)]
        assert {"libraries", "model", "weights"} <= set(stages)
        fractions = [loading.fraction for loading in router.all(Loading) if loading.stage == "weights"]
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1.0
        engine.send(Generate(request=greedy("a", 20)))
        router.wait_for_end("a")
        assert len(router.tokens("a")) == 6
        engine.send(Stop())
        status, errors = engine.wait()
        assert status == 0, errors


def test_sigterm_ends_it_cleanly_and_sigint_is_left_to_the_parent(router: RouterEnd, model: str) -> None:
    with EngineProcess(router, "colocated-0", model) as engine:
        engine.process.send_signal(signal.SIGINT)
        engine.send(Generate(request=greedy("a", 20)))
        router.wait_for_end("a")
        engine.process.send_signal(signal.SIGTERM)
        status, errors = engine.wait()
        assert status == 0, errors
        assert "Traceback" not in errors


def test_two_processes_answer_as_one(router: RouterEnd, model: str) -> None:
    sequences = [greedy(f"length-{length}", length, max_tokens=10) for length in (1, 15, 16, 17, 64, 200)]
    with EngineProcess(router, "prefill-0", model) as prefill, EngineProcess(router, "decode-0", model) as decode:
        prefill.send(*(Generate(request=msgspec.structs.replace(s, epoch=Epoch(0))) for s in sequences))
        router.wait_for_end(*(sequence.request_id for sequence in sequences))
        alone = {sequence.request_id: router.tokens(sequence.request_id) for sequence in sequences}
        router.received.clear()
        for sequence in sequences:
            prefill.send(Generate(request=sequence, hand_over=True))
            offer = router.expect(Offered).offer
            decode.send(Adopt(request=continuation(sequence, router.tokens(sequence.request_id)), offer=offer))
            assert router.expect(Pulled).failure == ""
        router.wait_for_end(*alone)
        assert {name: router.tokens(name) for name in alone} == alone


def test_a_source_killed_before_the_pull_costs_no_token(router: RouterEnd, model: str) -> None:
    sequence = greedy("a", 50)
    with EngineProcess(router, "decode-0", model) as decode:
        with EngineProcess(router, "prefill-0", model) as prefill:
            prefill.send(Generate(request=sequence, hand_over=True))
            offer = router.expect(Offered).offer
        decode.send(Adopt(request=continuation(sequence, router.tokens("a")), offer=offer))
        router.wait_for_end("a")
        assert "cannot open the peer's KV pool" in router.expect(Pulled).failure
        resumed = router.tokens("a")
        router.received.clear()
        decode.send(Generate(request=greedy("a", 50, epoch=2)))
        router.wait_for_end("a")
        assert router.tokens("a") == resumed


def test_the_default_model_loads_and_computes(router: RouterEnd, default_model: ModelFiles) -> None:
    cache = CacheSettings(kv_memory_bytes=64 << 20)
    settings = ModelSettings(model=str(default_model.path))
    with EngineProcess(router, "colocated-0", "", model=settings, cache=cache) as engine:
        engine.send(Generate(request=greedy("a", 20, max_tokens=3)))
        router.wait_for_end("a")
        assert len(router.tokens("a")) == 3


class TestWrongSettings:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            pytest.param({"model": ModelSettings(model="./no/such/folder")}, "no such model", marks=pytest.mark.slow),
            ({"cache": CacheSettings(kv_memory_bytes=1 << 60)}, "lower it"),
            ({"cpus": (100_000,)}, "cannot run on cores"),
            pytest.param({"event_log": "/dev/null/log"}, "cannot write the event log", marks=pytest.mark.slow),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self, router: RouterEnd, model: str, changes: dict[str, Any], words: str
    ) -> None:
        status, errors = EngineProcess(router, "colocated-0", model, **changes).wait()
        assert status == 2, errors
        last = errors.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert words in last
        assert "Traceback" not in errors

    def test_settings_that_are_none(self) -> None:
        process = start(b'{"instance": 7}')
        _, errors = process.communicate(timeout=END_DEADLINE_S)
        assert process.returncode == 2
        assert errors.startswith(b"error: instance settings on stdin")


STARTER = """
import subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "disagg.engine"], stdin=subprocess.PIPE)
settings = sys.stdin.buffer.readline().replace(b'"parent_pid":0', b'"parent_pid":%d' % __import__("os").getpid())
process.stdin.write(settings)
process.stdin.close()
print(process.pid, flush=True)
sys.stdin.buffer.readline()
"""


def test_it_does_not_outlive_its_parent(router: RouterEnd, model: str) -> None:
    settings = InstanceSettings(
        instance=InstanceId("orphan"),
        role=Role.COLOCATED,
        control_endpoint=router.endpoint,
        model=ModelSettings(model=model, dtype=DType.FLOAT32),
        cache=CacheSettings(kv_memory_bytes=1 << 20),
        scheduler=SchedulerSettings(),
    )
    parent = subprocess.Popen([sys.executable, "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(msgspec.json.encode(settings) + b"\n")
    parent.stdin.flush()
    engine = os.pidfd_open(int(parent.stdout.readline()))
    router.expect(Ready, "orphan")
    parent.kill()
    parent.communicate(timeout=END_DEADLINE_S)
    readable, _, _ = select.select([engine], [], [], END_DEADLINE_S)
    os.close(engine)
    assert readable, "the engine outlived its parent"


def test_a_parent_that_is_another_process_is_not_served(router: RouterEnd, model: str) -> None:
    engine = EngineProcess(router, "colocated-0", model, parent_pid=1)
    assert engine.wait()[0] == 0
    assert router.received == []
