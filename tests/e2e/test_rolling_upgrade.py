"""Everything replaced, one after the other, while requests go on: instances of other hosts, then the server."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from server_process import ServerProcess, completion, serving
from test_join import Joiner, door_of, joined, states
from test_lifecycle import wait_for

STREAMS = 2
EXACT = ("--dtype", "float32", "--kv-memory", "16MiB", "--threads", "1")


def tokens(server: ServerProcess, number: int) -> list[int]:
    """A long answer, so that one is under way whenever an instance is told to stop."""
    answer = completion(
        server, f"{number}: a house by the sea", max_tokens=300, ignore_eos=True, temperature=0.0, return_token_ids=True
    )
    return answer.choices[0].token_ids


@contextmanager
def under_load(server: ServerProcess, expected: Sequence[list[int]]) -> Iterator[None]:
    """Ask without a pause for the length of a block; every answer must come, and be the undisturbed one."""
    done = threading.Event()

    def ask_on(number: int) -> int:
        count = 0
        while not done.is_set():
            assert tokens(server, number) == expected[number]
            count += 1
        return count

    with ThreadPoolExecutor(STREAMS) as pool:
        asking = [pool.submit(ask_on, number) for number in range(STREAMS)]
        try:
            yield
        finally:
            done.set()
        assert all(one.result() > 0 for one in asking)


def wait_ready(server: ServerProcess, *instances: str) -> None:
    wait_for(lambda: set(instances) == {name for name, state in states(server).items() if state == "ready"}, instances)


@pytest.mark.slow
def test_instances_then_the_server_are_replaced_and_no_request_fails(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = str(tiny_model("llama"))
    keys = ("--keys", str(tmp_path / "keys"))
    alone = (model, "--prefill", "0", "--decode", "0", *EXACT, *keys, "--listen-instances")
    with ExitStack() as hosts:
        with serving(*alone, "127.0.0.1:0") as server:
            door = door_of(server)

            def join(role: str, *more: str) -> Joiner:
                arguments = ("--join", door, "--role", role, *keys, *EXACT, "--drain-s", "60", *more)
                return hosts.enter_context(joined(model, *arguments))

            old = [join("decode"), join("decode")]
            ready_file = tmp_path / "ready"
            join("prefill", "--ready-file", str(ready_file))
            wait_ready(server, "decode-0", "decode-1", "prefill-0")
            wait_for(ready_file.exists, "the file for probes")
            expected = [tokens(server, number) for number in range(STREAMS)]
            with under_load(server, expected):
                for number, host in enumerate(old):
                    join("decode")
                    wait_for(lambda: list(states(server).values()).count("ready") == 4, "the replacement")
                    assert host.end(signal.SIGTERM) == 0
                    assert len(states(server)) == 3, f"decode-{number} left before its host ended"
            assert server.metric("disagg:instance_losses_total") == 0
            assert server.metric("disagg:sequences_resumed_total") == 0
        wait_for(lambda: not ready_file.exists(), "the end of the file for probes")
        with serving(*alone, door) as server:
            wait_for(lambda: server.get("/ready").status_code == 200, "the instances that join the new server")
            assert [tokens(server, number) for number in range(STREAMS)] == expected
