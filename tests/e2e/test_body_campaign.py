"""Random bodies against a real server, while a probe asks for its health: nothing falls, nobody waits."""

import queue
import threading
import time
from collections import Counter

import httpx
import psutil
import pytest
from server_process import ServerProcess, completion, serving

from random_bodies import BodyMaker

NUM_BODIES = 20_000
NUM_CLIENTS = 4
HEALTH_S = 0.5
DEADLINE_S = 120.0
SETTINGS = ("--max-model-len", "1024", "--kv-memory", "256MiB", "--request-timeout-s", "60")


class Prober:
    """Asks for the server's health again and again, on connections of its own, and keeps the longest wait."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._probe)
        self.waits_s: list[float] = []
        self.failures: list[str] = []

    def __enter__(self) -> "Prober":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _probe(self) -> None:
        with httpx.Client(timeout=DEADLINE_S) as client:
            while not self._ended.wait(0.02):
                begun = time.monotonic()
                try:
                    if (status := client.get(f"{self._url}/health").status_code) != 200:
                        self.failures.append(str(status))
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))
                self.waits_s.append(time.monotonic() - begun)


def run_campaign(server: ServerProcess, num_bodies: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Send so many bodies and return how often each status came, and what was wrong."""
    bodies: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
    maker = BodyMaker(seed, vocab_size=49_152)
    for _ in range(num_bodies):
        bodies.put(maker.make())
    statuses: Counter[int] = Counter()
    faults: list[str] = []

    def send() -> None:
        with httpx.Client(timeout=DEADLINE_S) as client:
            while True:
                try:
                    path, body = bodies.get_nowait()
                except queue.Empty:
                    return
                try:
                    response = client.post(f"{server.url}{path}", content=body)
                    statuses[response.status_code] += 1
                    is_wrong = response.status_code >= 500 and response.status_code != 503
                    if is_wrong or "internal error" in response.text:
                        faults.append(f"{response.status_code} {path} {body[:2000]!r}: {response.text[-500:]}")
                except httpx.HTTPError as error:
                    faults.append(f"{error!r} {path} {body[:2000]!r}")

    clients = [threading.Thread(target=send) for _ in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return statuses, faults


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_no_body_ends_or_holds_up_anything() -> None:
    with serving(*SETTINGS, "--trust-request-chat-template") as server:
        instances = {process.pid for process in server.instances()}
        with Prober(server.url) as prober:
            statuses, faults = run_campaign(server, NUM_BODIES, seed=1)
        assert not faults, f"{len(faults)} of {statuses}, such as {faults[:5]}"
        tracebacks = [line for line in server.log if line.startswith("Traceback")]
        assert not tracebacks, server.text[(at := server.text.index(tracebacks[0])) : at + 5000]
        assert {process.pid for process in server.instances()} == instances
        assert not prober.failures
        assert max(prober.waits_s) <= HEALTH_S, sorted(prober.waits_s)[-10:]
        assert completion(server, "Hello", max_tokens=3).usage.completion_tokens > 0


LARGE = 15 << 20
LARGE_BODIES = {
    "tokenize": ("/tokenize", b'{"prompt": "%s"}' % (b"The quick brown fox. " * (LARGE // 21))),
    "prompt": ("/v1/completions", b'{"prompt": "%s"}' % (b"The quick brown fox. " * (LARGE // 21))),
    "one word": ("/v1/completions", b'{"prompt": "%s"}' % (b"a" * LARGE)),
    "message": ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "%s"}]}' % (b" a" * (LARGE // 2))),
    "token ids": ("/v1/completions", b'{"prompt": [%s 1]}' % (b"1," * (LARGE // 2 - 20))),
    "prompts": ("/v1/completions", b'{"prompt": [%s ""]}' % (b'"",' * (LARGE // 3 - 20))),
    "detokenize": ("/detokenize", b'{"tokens": [%s 1]}' % (b"1," * (LARGE // 2 - 20))),
    "stop strings": ("/v1/completions", b'{"prompt": "x", "stop": ["%s"]}' % (b"a" * LARGE)),
    "deep": ("/v1/completions", b'{"prompt": "x", "metadata": %s' % (b"[" * LARGE)),
    "wide": ("/v1/completions", b'{"prompt": "x", %s "n": 1}' % b"".join(b'"%d": null,' % n for n in range(1_000_000))),
    "messages": ("/v1/chat/completions", b'{"messages": [%s {"role": ""}]}' % (b'{"role": ""},' * (LARGE // 13 - 20))),
}


@pytest.mark.slow
def test_large_bodies_hold_up_nobody_and_their_memory_goes_back() -> None:
    with serving(*SETTINGS) as server, httpx.Client(base_url=server.url, timeout=DEADLINE_S) as client:
        process = psutil.Process(server.process.pid)
        before = process.memory_info().rss
        with Prober(server.url) as prober:
            for name, (path, body) in LARGE_BODIES.items():
                assert client.post(path, content=body).status_code == (200 if name == "wide" else 400), name
        assert not prober.failures
        assert max(prober.waits_s) <= HEALTH_S, sorted(prober.waits_s)[-10:]
        end = time.monotonic() + DEADLINE_S
        while process.memory_info().rss > before + (64 << 20):
            assert time.monotonic() < end, f"{process.memory_info().rss} bytes are held, {before} at the start"
            time.sleep(0.1)
