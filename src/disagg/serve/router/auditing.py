"""Audits: every instance is asked at the same instant what its KV blocks are, and given some time to answer."""

import asyncio
from collections.abc import Callable, Collection

from disagg.base.errors import UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import Message
from disagg.base.messages import AuditBlocks, Audited

AUDIT_TIMEOUT_S = 10.0
"""An instance answers between two steps."""


class Auditing:
    """The audits under way of one router. ``send`` takes a message to an instance, or raises UnavailableError.

    Numbers count from ``first``: an instance of several routers answers to all of them, which then differ in theirs.
    """

    def __init__(
        self, send: Callable[[InstanceId, Message], None], timeout_s: float = AUDIT_TIMEOUT_S, first: int = 0
    ) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._number = first
        self._answers: dict[tuple[int, InstanceId], asyncio.Future[Audited]] = {}

    async def ask(self, instances: Collection[InstanceId]) -> dict[InstanceId, Audited]:
        """Return what each instance answers; one that is gone, or silent for ``timeout_s``, is left out."""
        self._number += 1
        number, loop = self._number, asyncio.get_running_loop()
        waiting: dict[InstanceId, asyncio.Future[Audited]] = {}
        for instance in instances:
            try:
                self._send(instance, AuditBlocks(number=number))
            except UnavailableError:
                continue
            waiting[instance] = self._answers[number, instance] = loop.create_future()
        try:
            if waiting:
                await asyncio.wait(waiting.values(), timeout=self._timeout_s)
        finally:
            for instance in waiting:
                del self._answers[number, instance]
        return {instance: answer.result() for instance, answer in waiting.items() if answer.done()}

    def take(self, sender: InstanceId, answer: Audited) -> None:
        """Take what an instance says; nobody waits for what comes too late."""
        future = self._answers.get((answer.number, sender))
        if future is not None and not future.done():
            future.set_result(answer)
