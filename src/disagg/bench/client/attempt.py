"""One request under way: sent at its time, ended in one of the ways a request can end, and turned into its record."""

import asyncio
import math
import time
from dataclasses import dataclass, field

from disagg.bench.client.answer_stream import StreamReader, read_error
from disagg.bench.client.calls import Call
from disagg.bench.client.connection import ConnectionPool, ConnectTimeoutError, HttpAnswer, LostConnectionError
from disagg.measure.record import Ending, RequestRecord


@dataclass(slots=True)
class Attempt:
    """A call with its prompt's true length, and what came of it so far. Moments are of ``time.perf_counter``."""

    call: Call
    request_id: str
    message: bytes
    prompt_len: int
    due_s: float = math.nan
    """When it was to be sent, in seconds since the start of the run."""
    sent_s: float = math.nan
    answer: HttpAnswer = field(default_factory=HttpAnswer)
    ending: Ending = Ending.UNFINISHED
    error: str = ""
    detail: str = ""

    async def send(self, pool: ConnectionPool, timeout_s: float) -> None:
        """Send it and wait for its end, at most ``timeout_s``. Cancelling leaves it unfinished, with what came."""
        self.sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                await pool.exchange(self.message, self.answer)
        except TimeoutError:
            self._fail(Ending.TIMED_OUT, "timeout", f"not finished after {timeout_s:g} s")
        except LostConnectionError as error:
            if self.answer.status:
                self._fail(Ending.BROKEN, "stream ended early", str(error))
            else:
                self._fail(Ending.UNREACHABLE, "connection lost", str(error))
        except ConnectTimeoutError as error:
            self._fail(Ending.UNREACHABLE, "ConnectTimeout", str(error))
        except OSError as error:
            self._fail(Ending.UNREACHABLE, "ConnectError", str(error))
        else:
            self.ending = Ending.FINISHED

    def record(self, reader: StreamReader, started_s: float) -> tuple[RequestRecord, int | None]:
        """Return the record, with times since ``started_s``, and the prompt's length as the server counted it."""
        answer = self.answer
        is_answered = answer.status == 200
        stream = reader.read(answer.pieces if is_answered else ())
        ending, error, detail = self.ending, self.error, self.detail
        if answer.status and not is_answered and ending is not Ending.UNFINISHED:
            ending, error, detail = Ending.REFUSED, f"HTTP {answer.status}", read_error(answer.body)
        elif stream.error:
            ending, error, detail = Ending.BROKEN, "error event", stream.error
        elif ending is Ending.FINISHED and not stream.is_whole:
            ending, error, detail = Ending.BROKEN, "stream ended early", "it ended without a reason and without [DONE]"
        record = RequestRecord(
            index=self.call.index,
            request_id=self.request_id,
            prompt_len=self.prompt_len,
            max_output_len=self.call.output_len,
            due_s=self.due_s,
            sent_s=math.nan if math.isnan(self.sent_s) else self.sent_s - started_s,
            finished_s=math.nan if answer.ended_s is None else answer.ended_s - started_s,
            event_s=tuple(moment_s - started_s for moment_s in stream.event_s),
            event_tokens=stream.event_tokens,
            ending=ending,
            error=error,
            detail=detail,
            session=self.call.session,
            turn=self.call.turn,
        )
        return record, stream.prompt_tokens

    def _fail(self, ending: Ending, error: str, detail: str) -> None:
        self.ending, self.error, self.detail = ending, error, detail
