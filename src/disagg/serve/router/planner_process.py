"""Answers the router's questions for a plan in a child process, started by name for each question."""

import asyncio
import logging
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from disagg.scheduling.replan.question import PlanAnswer, PlanQuestion
from disagg.scheduling.router.inputs import Planned, PlanningFailed

logger = logging.getLogger(__name__)

PLANNER_COMMAND: Final = (sys.executable, "-m", "disagg.placement.replan_process")
DEADLINE_S: Final = 300.0


class PlannerProcess:
    """One question at a time; ``hear`` is told the answer, or why there is none, on the event loop."""

    def __init__(
        self, hear: Callable[[Planned | PlanningFailed], None], command: Sequence[str] = PLANNER_COMMAND
    ) -> None:
        self._hear = hear
        self._command = command
        self._task: asyncio.Task[None] | None = None

    def ask(self, question: PlanQuestion) -> None:
        """Begin to answer."""
        self._task = asyncio.create_task(self._answer(question), name="planner")

    async def close(self) -> None:
        """End a process that is still at work."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _answer(self, question: PlanQuestion) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer = await self._run(msgspec.json.encode(question))
            news: Planned | PlanningFailed = Planned(answer=msgspec.json.decode(answer, type=PlanAnswer))
        except (OSError, TimeoutError, msgspec.MsgspecError) as error:
            logger.warning("the placement could not be planned anew: %s", error or f"no answer in {DEADLINE_S:g} s")
            news = PlanningFailed(why=str(error))
        self._hear(news)

    async def _run(self, question: bytes) -> bytes:
        process = await asyncio.create_subprocess_exec(*self._command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        try:
            answer, _ = await process.communicate(question)
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        return answer
