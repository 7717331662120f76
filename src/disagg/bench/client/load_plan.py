"""What a run is to do: which server, which load, when to give up."""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from disagg.base.errors import ConfigurationError
from disagg.measure.open_loop import OpenLoop
from disagg.measure.sessions import SessionWorkload
from disagg.measure.slo import Slo
from disagg.measure.workload import RequestSpec, Session


class Endpoint(enum.Enum):
    """How prompts are sent."""

    COMPLETIONS = "completions"
    """``/v1/completions`` with text."""
    COMPLETION_TOKENS = "completions-tokens"
    """``/v1/completions`` with token ids."""
    CHAT = "chat"
    """``/v1/chat/completions`` with one message; the prompt's length counts the chat template."""


@dataclass(frozen=True, slots=True)
class Server:
    """Whom to ask. ``url`` with or without ``/v1``; ``model`` is the name to send, empty for the server's first."""

    url: str
    endpoint: Endpoint = Endpoint.COMPLETIONS
    model: str = ""
    api_key: str | None = None

    @property
    def base_url(self) -> str:
        """The URL that ``/v1/...`` follows."""
        return self.url.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Asking:
    """What every request asks for besides its prompt and its length."""

    temperature: float = 0.0
    ignore_eos: bool = True
    """Answers have the length of the workload: ``max_tokens`` with ``ignore_eos``."""
    min_tokens: bool = False
    """Ask for ``min_tokens`` too, for servers that stop nevertheless."""
    continuous_usage: bool = True
    """Ask for token counts in every event, so that events of several tokens, or none, are counted right."""
    extra: dict[str, object] = field(default_factory=dict)
    """Further fields of the body."""


@dataclass(frozen=True, slots=True)
class OpenLoad:
    """Requests that are sent at their times, whatever becomes of those before them."""

    requests: Sequence[RequestSpec]
    """In order of arrival, each with a time."""


@dataclass(frozen=True, slots=True)
class ClosedLoad:
    """``num_users`` users, each of whom sends the next request ``think_s`` after the answer to the last."""

    requests: Sequence[RequestSpec]
    num_users: int
    think_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_users < 1:
            raise ConfigurationError(f"{self.num_users} users cannot be: give at least one")


@dataclass(frozen=True, slots=True)
class SessionLoad:
    """Sessions, whose calls wait for one another.

    They start at their ``start_s``; or, with ``num_users``, one after the other, that many at a time.
    """

    sessions: Sequence[Session]
    num_users: int | None = None

    def __post_init__(self) -> None:
        if self.num_users is None and any(math.isnan(session.start_s) for session in self.sessions):
            raise ConfigurationError("some sessions have no start: give a rate of sessions, or a number of users")


Load = OpenLoad | ClosedLoad | SessionLoad


def load_of(
    workload: OpenLoop | SessionWorkload,
    seed: int,
    num_users: int | None = None,
    think_s: float = 0.0,
    count: int | None = None,
) -> Load:
    """Return what is sent for a seed, at its times or by ``num_users``: all, or ``count`` requests or sessions."""
    if isinstance(workload, SessionWorkload):
        return SessionLoad(tuple(islice(workload.draw(seed), count)), num_users)
    requests = tuple(islice(workload.draw(seed), count))
    return OpenLoad(requests) if num_users is None else ClosedLoad(requests, num_users, think_s)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a request or a whole run is given up. What is then under way, or never sent, counts as a miss."""

    request_timeout_s: float = 600.0
    max_outstanding: int = 1000
    """Requests under way at once; with more, the server is hopelessly behind and the run ends."""
    deadline_s: float = math.inf
    """Longest run, from its first request's time on."""
    target: float | None = None
    """End the run once the attainment of ``slo`` can no longer reach this part of all requests."""
    slo: Slo = Slo()  # noqa: RUF009 (frozen)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """One run."""

    server: Server
    load: Load
    prompt_seed: int | None = None
    """Of the prompts' text. None draws a new one, so that no cache of the server's has seen these prompts before."""
    asking: Asking = Asking()
    limits: Limits = Limits()
    num_warmup: int = 1
    """Requests before the run, not counted: long as the first ones, one after the other, with other texts.

    The first one, which is always sent, also shows whether the server understands what is asked.
    """

    @property
    def is_open_loop(self) -> bool:
        """True when the load has times of its own."""
        return isinstance(self.load, OpenLoad)

    def numbered(self, number: int) -> "LoadPlan":
        """Return the plan for the run of this number: with other texts than the runs before it."""
        if self.prompt_seed is None:
            return self
        return replace(self, prompt_seed=self.prompt_seed + number)
