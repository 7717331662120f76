"""Faults and commands, in an order drawn from a seed, on a real server under load.

Every answer has to be the one that would have come. What happened is counted, so that nobody takes a campaign without
faults for a good one.
"""

import enum
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import psutil
from server_process import ServerProcess, completion
from test_lifecycle import wait_for

INSTANCE_TIMEOUT_S = 10.0
"""More than a busy machine keeps a healthy instance from its turn."""
INSTANCE_WAIT_S = 120.0
"""More than such a machine takes to start the only instance that is left: waiting is no fault, giving up is one."""
SETTINGS = (
    *("--dtype", "float32", "--max-model-len", "512", "--kv-memory", "128MiB", "--block-size", "32", "--threads", "1"),
    *("--max-instance-losses", "1000", "--instance-timeout-s", str(INSTANCE_TIMEOUT_S)),
    *("--instance-wait-s", str(INSTANCE_WAIT_S)),
)
MOST_DEATHS = 3
"""Of one instance: one more in quick succession, and it would soon be given up."""
NUM_HUNGRY = 4
"""Prompts that come while an instance gets no memory."""


class Fault(enum.Enum):
    """What is done to an instance."""

    KILL = "kill -9"
    FREEZE = "freeze for longer than --instance-timeout-s"
    PAUSE = "freeze for a moment"
    STARVE = "no more memory, while there are prompts that want much of it"
    DRAIN = "drain"
    UNDRAIN = "undo a drain"
    FLIP = "flip"
    REPLACE = "add one like it and remove it"


_DEADLY = {Fault.KILL, Fault.FREEZE, Fault.STARVE}
"""Those of which an instance may die."""


@dataclass(frozen=True)
class Question:
    """One completion, and after how many tokens its client goes away; None: it stays."""

    prompt: str
    fields: dict[str, Any]
    leaves_after: int | None = None


@dataclass
class Outcome:
    """What came of a campaign. All but ``faults``, ``refused`` and the counts of requests must be as it was before."""

    faults: Counter[Fault] = field(default_factory=Counter)
    refused: Counter[Fault] = field(default_factory=Counter)
    num_whole: int = 0
    num_left: int = 0
    wrong: list[str] = field(default_factory=list)


def questions(count: int, seed: int, longest: int = 20) -> list[Question]:
    """Prompts of many lengths, greedy and sampled ones, with all that depends on the position or on earlier tokens.

    Each is a sentence of some seven tokens, ``longest`` times at most.
    """
    rng = random.Random(seed)
    drawn = []
    for number in range(count):
        sampled = {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.6, "frequency_penalty": 0.3}
        length = rng.randint(16, 64)
        fields = {
            "max_tokens": length,
            "min_tokens": length,
            "seed": 100 + number,
            "return_token_ids": True,
            **(sampled if number % 2 else {"temperature": 0.0, "repetition_penalty": 1.2}),
        }
        prompt = f"Story number {number}: " + "there was a house by the sea, " * rng.randint(1, longest)
        drawn.append(Question(prompt, fields))
    return drawn


class Campaign:
    """One server under ``concurrency`` clients, and one that brings faults."""

    def __init__(
        self, server: ServerProcess, seed: int, kinds: Collection[Fault] = tuple(Fault), concurrency: int = 6
    ) -> None:
        self._server = server
        self._kinds = list(kinds)
        self._rng = random.Random(seed)
        self._concurrency = concurrency
        self._over = threading.Event()
        self._has_enough = threading.Event()
        self._deaths: Counter[str] = Counter()
        self.outcome = Outcome()

    def run(
        self,
        asked: list[Question],
        expected: dict[str, list[int]],
        *,
        pace_s: float,
        least_faults: int,
        least_s: float = 0.0,
    ) -> Outcome:
        """Ask all, and again until there were so many faults, one every ``pace_s`` or so, and ``least_s`` are over."""
        self._enough_at_s = time.monotonic() + least_s
        faults = threading.Thread(target=self._bring_faults, args=(pace_s, least_faults))
        faults.start()
        try:
            with ThreadPoolExecutor(self._concurrency) as clients:
                for client in range(self._concurrency):
                    clients.submit(self._ask_all, asked[client :: self._concurrency], expected)
        finally:
            self._over.set()
            faults.join()
        return self.outcome

    def _ask_all(self, asked: list[Question], expected: dict[str, list[int]]) -> None:
        """Be one client."""
        for number in count():
            if number >= len(asked) and self._has_enough.is_set():
                return
            question = asked[number % len(asked)]
            if words := self._ask(question, expected[question.prompt]):
                self.outcome.wrong.append(words)

    def _ask(self, question: Question, expected: list[int]) -> str:
        """Return what is wrong with an answer; an empty string for nothing."""
        tokens: list[int] = []
        try:
            stream = completion(self._server, question.prompt, stream=True, **question.fields)
            with stream:
                for chunk in stream:
                    for choice in chunk.choices:
                        tokens += getattr(choice, "token_ids", None) or []
                    if question.leaves_after is not None and len(tokens) >= question.leaves_after:
                        expected = expected[: len(tokens)]
                        self.outcome.num_left += 1
                        break
                else:
                    self.outcome.num_whole += 1
        except Exception as error:
            return f"{question.prompt[:20]!r} failed after {len(tokens)} tokens: {error}"
        if tokens == expected:
            return ""
        return f"{question.prompt[:20]!r} is another answer of {len(tokens)} tokens, not {len(expected)}"

    # Faults ---------------------------------------------------------------------------------------------------

    def _bring_faults(self, pace_s: float, least: int) -> None:
        try:
            for number, fault in enumerate(self._deck()):
                if number >= least and time.monotonic() >= self._enough_at_s:
                    self._has_enough.set()
                if self._over.wait(self._rng.uniform(0.5, 1.5) * pace_s):
                    return
                self._bring(fault)
        except Exception as error:
            self.outcome.wrong.append(f"the campaign itself failed: {error!r}")
            self._has_enough.set()

    def _deck(self) -> Iterator[Fault]:
        while True:
            yield from self._rng.sample(self._kinds, len(self._kinds))

    def _bring(self, fault: Fault) -> None:
        ready = [one for one in self._instances() if one["state"] == "ready"]
        if not ready:
            return
        victim = self._rng.choice(sorted(ready, key=lambda one: one["instance"]))
        name, pid = victim["instance"], victim["pid"]
        if self._deaths[name] >= MOST_DEATHS and fault in _DEADLY:
            fault = Fault.REPLACE
        done = self._bring_to(fault, name, pid, victim["role"])
        (self.outcome.faults if done else self.outcome.refused)[fault] += 1

    def _bring_to(self, fault: Fault, name: str, pid: int, role: str) -> bool:
        """Return False where the server refuses it."""
        match fault:
            case Fault.KILL:
                self._deaths[name] += 1
                send_signal(pid, signal.SIGKILL)
            case Fault.FREEZE:
                self._deaths[name] += 1
                self._freeze(pid, 1.5 * INSTANCE_TIMEOUT_S)
            case Fault.PAUSE:
                self._freeze(pid, self._rng.uniform(0.05, 1.0))
            case Fault.STARVE:
                self._deaths[name] += 1
                self._starve(pid)
            case Fault.DRAIN:
                return self._command(f"{name}/drain", {})
            case Fault.UNDRAIN:
                drained = [one["instance"] for one in self._instances() if one["state"] == "draining"]
                return bool(drained) and self._command(f"{drained[0]}/drain", {"undo": True})
            case Fault.FLIP:
                roles = sorted({"prefill", "decode", "colocated"} - {role})
                return self._command(f"{name}/flip", {"role": self._rng.choice(roles)})
            case Fault.REPLACE:
                return self._replace(name, role)
        return True

    def _freeze(self, pid: int, seconds: float) -> None:
        send_signal(pid, signal.SIGSTOP)
        self._over.wait(seconds)
        send_signal(pid, signal.SIGCONT)

    def _starve(self, pid: int) -> None:
        """Refuse a process all memory that it does not have yet, until prompts were answered whose logits want much."""
        with suppress(psutil.NoSuchProcess), ThreadPoolExecutor(NUM_HUNGRY) as clients:
            process = psutil.Process(pid)
            _, most = process.rlimit(psutil.RLIMIT_AS)
            process.rlimit(psutil.RLIMIT_AS, (process.memory_info().rss, most))
            number = self._rng.random()
            prompts = [
                f"{number} {index}: " + "the sea took much and gave little, " * 40 for index in range(NUM_HUNGRY)
            ]
            self.outcome.wrong += filter(None, clients.map(self._ask_for_logprobs, prompts))
            process.rlimit(psutil.RLIMIT_AS, (most, most))

    def _ask_for_logprobs(self, prompt: str) -> str:
        """Return why a prompt did not get the log-probabilities of its tokens; an empty string if it did."""
        try:
            answer = completion(self._server, prompt, max_tokens=1, echo=True, logprobs=1)
        except Exception as error:
            return f"the logprobs of {prompt[:20]!r} failed: {error}"
        return "" if len(answer.choices[0].logprobs.tokens) > 40 else f"too few logprobs of {prompt[:20]!r}"

    def _replace(self, name: str, role: str) -> bool:
        added = self._post("", {"role": role})
        assert added.status_code == 202, added.text
        other = added.json()["instance"]
        wait_for(lambda: self._state(other) == "ready", f"{other} to start")
        if not self._command(f"{name}/remove", {}):
            return False
        wait_for(lambda: self._state(name) == "", f"{name} to leave")
        return True

    def _command(self, path: str, body: dict[str, object]) -> bool:
        answer = self._post(f"/{path}", body)
        assert answer.status_code in (202, 409), answer.text
        return answer.status_code == 202

    def _post(self, path: str, body: dict[str, object]) -> httpx.Response:
        return httpx.post(f"{self._server.url}/admin/instances{path}", json=body, timeout=30.0)

    def _instances(self) -> list[dict[str, Any]]:
        listed = self._server.get("/admin/instances").json()["instances"]
        assert isinstance(listed, list)
        return listed

    def _state(self, name: str) -> str:
        return next((one["state"] for one in self._instances() if one["instance"] == name), "")


def undisturbed(server: ServerProcess, asked: list[Question], concurrency: int = 6) -> dict[str, list[int]]:
    """Return the answers of a server that nobody disturbs, by prompt."""

    def answer(question: Question) -> list[int]:
        return list(completion(server, question.prompt, **question.fields).choices[0].token_ids)

    with ThreadPoolExecutor(concurrency) as clients:
        return dict(zip([one.prompt for one in asked], clients.map(answer, asked), strict=True))


def audit(server: ServerProcess) -> dict[str, Any]:
    """Every KV block of every instance, at one instant."""
    found = server.get("/debug/audit").json()
    assert isinstance(found, dict)
    return found


def num_held_blocks(server: ServerProcess) -> float:
    """KV blocks that are neither free nor cached."""
    return sum(
        server.metric("disagg:kv_blocks", state=state) for state in ("active", "leased", "filling", "quarantined")
    )


def resources(server: ServerProcess) -> tuple[int, int]:
    """Open files and resident bytes of the server's own process."""
    process = psutil.Process(server.process.pid)
    return process.num_fds(), process.memory_info().rss


def send_signal(pid: int, number: signal.Signals) -> None:
    """Signal a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
