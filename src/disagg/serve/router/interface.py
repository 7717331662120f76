"""What the API sees of the router: submit a sequence, read its tokens, abort it, look at the instances."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from disagg.base.ids import InstanceId, RequestId, RouterId
from disagg.base.messages import Audited, InstanceFacts, InstanceLoad, SequenceOutput
from disagg.base.request import GenerationRequest, Role
from disagg.measure.timeline import RequestTimeline
from disagg.scheduling.dispatch.state import InstanceState
from disagg.scheduling.router.elastic_view import ElasticView
from disagg.scheduling.router.link_survey import MeasuredLink


class InstanceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One instance now. ``facts`` are known once it was ready; ``num_restarts`` counts its deaths."""

    instance: InstanceId
    role: Role
    state: InstanceState
    facts: InstanceFacts | None = None
    load: InstanceLoad = InstanceLoad()
    num_restarts: int = 0
    num_sequences: int = 0
    """Sequences that it computes, or whose KV blocks it keeps for another instance, those of other routers included."""
    is_leaving: bool = False
    """True when it is removed once it holds nothing."""
    detail: str = ""


class ServedBy(msgspec.Struct, frozen=True):
    """Which instances brought tokens of a sequence; None where none did (yet). A colocated one is both."""

    prefill: InstanceId | None = None
    decode: InstanceId | None = None


class SequenceStream(Protocol):
    """The tokens of one submitted sequence, as they come.

    It ends with the output that carries a ``finish_reason``, or with an error: InstanceLostError when it was on
    ``max_instance_losses`` instances that died, RequestTimeoutError when its deadline passed, ContextLengthError when
    no KV pool can hold it. Not to read on does not abort: call ``Router.abort``.
    """

    def listen(self, on_news: Callable[[], None], take_at_once: Callable[[SequenceOutput], bool] | None = None) -> None:
        """Have ``on_news`` called, on the event loop, when there is something to take. It replaces the one before.

        An output before which nothing waits is first given to ``take_at_once``, which must not raise: it returns
        whether it has taken it.
        """

    def take(self) -> Sequence[SequenceOutput]:
        """Return the outputs since the last call; each has at least one new token, except perhaps the last.

        Once all were returned, raises the error that the stream ended with, if there is one.
        """

    @property
    def is_ended(self) -> bool:
        """True when nothing is left to take, and nothing more will come."""

    @property
    def timeline(self) -> RequestTimeline:
        """Stage stamps so far; complete once the stream has ended."""

    @property
    def served_by(self) -> ServedBy:
        """Who brought the tokens so far."""

    @property
    def is_best_effort(self) -> bool:
        """True where it was predicted to miss its objectives and is served when others leave time."""


class Router(Protocol):
    """The API's view of the router."""

    name: RouterId
    """Which of a server's routers it is: its sequences are named after it."""

    def submit(self, request: GenerationRequest) -> SequenceStream:
        """Queue one sequence; raise OverloadedError when the bound is reached, UnavailableError when nobody serves."""

    async def wait_started(self) -> None:
        """Return once requests can be served for the first time, or the server ends.

        Raises UnavailableError after ``instance_wait_s``, OverloadedError when too many wait already.
        """

    def abort(self, request_id: RequestId) -> None:
        """Forget a sequence in whatever state it is; unknown or finished ids are ignored."""

    def instances(self) -> tuple[InstanceStatus, ...]:
        """Return every configured instance."""

    async def audit(self) -> tuple[dict[InstanceId, Audited], tuple[str, ...]]:
        """Return what the KV blocks of each live instance are at this instant, and what else is wrong, in words."""

    def elastic_view(self) -> ElasticView:
        """Return what autoscaling saw last of the roles that it looks at, and what was decided of the placement."""

    def links(self) -> tuple[MeasuredLink, ...]:
        """Return the links over which KV blocks are handed over, with what was measured of them."""

    def is_ready(self) -> bool:
        """True with one live prefill and one live decode instance, or one live colocated instance."""
