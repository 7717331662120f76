"""A router's process as its operator and its clients see it: what concerns the whole fleet is asked of its keeper."""

import asyncio
from itertools import count
from typing import Final

from disagg.base.errors import ConfigurationError, UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.scheduling.dispatch.events import ChangeRole, Drain, Undrain
from disagg.scheduling.router.inputs import MeasureLinks
from disagg.scheduling.router.outputs import AddInstance
from disagg.serve.launch.fleet_messages import (
    AllMetrics,
    AnyOrder,
    CommandAnswered,
    CommandGiven,
    MetricsWanted,
    RestartRouters,
)
from disagg.serve.launch.message_pipe import MessagePipe

ANSWER_S: Final = 10.0
"""The keeper answers at once, or it is stuck."""

_Answer = CommandAnswered | AllMetrics


class RemoteOperator:
    """See ``Operator``."""

    def __init__(self, pipe: MessagePipe) -> None:
        self._pipe = pipe
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[_Answer]] = {}

    async def drain(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        return (await self._order(Drain(instance=instance, force=force))).words

    async def undrain(self, instance: InstanceId) -> str:
        """See Operator."""
        return (await self._order(Undrain(instance=instance))).words

    async def remove(self, instance: InstanceId, *, force: bool) -> str:
        """See Operator."""
        return (await self._order(Drain(instance=instance, leave=True, force=force))).words

    async def flip(self, instance: InstanceId, role: Role, *, force: bool) -> str:
        """See Operator."""
        return (await self._order(ChangeRole(instance=instance, role=role, force=force))).words

    async def add(self, role: Role) -> tuple[InstanceId, str]:
        """See Operator."""
        answer = await self._order(AddInstance(role=role))
        return answer.instance, answer.words

    async def measure_links(self) -> None:
        """See Operator."""
        await self._order(MeasureLinks())

    async def restart(self) -> str:
        """See Operator."""
        return (await self._order(RestartRouters())).words

    async def all_metrics(self) -> bytes:
        """Return what all routers have counted, in Prometheus' text format."""
        number = next(self._numbers)
        answer = await self._ask(number, MetricsWanted(number=number))
        assert isinstance(answer, AllMetrics), "an answer is of the kind that was asked for"
        return answer.text

    def hear(self, answer: _Answer) -> None:
        """Take what the keeper says; nobody waits for what comes too late."""
        future = self._waiting.get(answer.number)
        if future is not None and not future.done():
            future.set_result(answer)

    async def _order(self, command: AnyOrder) -> CommandAnswered:
        number = next(self._numbers)
        answer = await self._ask(number, CommandGiven(number=number, command=command))
        assert isinstance(answer, CommandAnswered), "an answer is of the kind that was asked for"
        if answer.error:
            raise ConfigurationError(answer.error)
        return answer

    async def _ask(self, number: int, question: CommandGiven | MetricsWanted) -> _Answer:
        """Raise UnavailableError where no answer comes."""
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._pipe.send(question)
            return await asyncio.wait_for(future, ANSWER_S)
        except TimeoutError:
            raise UnavailableError(f"the process that keeps the instances gave no answer in {ANSWER_S:g} s") from None
        finally:
            del self._waiting[number]
