"""What a client saw of one request: the one place where stamps become TTFT, TPOT, ITL and end-to-end time."""

import enum
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.measure.slo import Slo
from disagg.measure.trace_rows import UNREADABLE, numbered_lines, open_text


class Ending(enum.Enum):
    """How a request ended, as its client saw it. Every one but FINISHED is a miss."""

    FINISHED = "finished"
    REFUSED = "refused"
    """The server answered with an error status, such as 429 or 503."""
    BROKEN = "broken"
    """An error event in the stream, or a stream that ended without its end."""
    UNREACHABLE = "unreachable"
    """No connection, or one that was lost."""
    TIMED_OUT = "timed_out"
    """The client's own deadline passed."""
    UNFINISHED = "unfinished"
    """Still under way, or never sent, when the run was ended."""


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request. Times are seconds since the start of the run, on the client's monotonic clock.

    ``event_s`` are the times of streamed events that carried output, ``event_tokens`` how many tokens each carried:
    one, unless the server sends several at once. A stamp that is missing is NaN, and left out of the file.
    """

    index: int
    request_id: str
    prompt_len: int
    max_output_len: int
    due_s: float
    """When the workload wanted it sent."""
    sent_s: float = math.nan
    finished_s: float = math.nan
    event_s: tuple[float, ...] = ()
    event_tokens: tuple[int, ...] = ()
    ending: Ending = Ending.UNFINISHED
    error: str = ""
    """Kind of the failure, such as ``HTTP 429`` or ``ConnectError``; empty when it finished."""
    detail: str = ""
    session: str = ""
    turn: int = 0
    stages: dict[str, float] = {}
    """Seconds of each stage (``measure.timeline.Stage``), where the server tells them."""
    instances: tuple[str, ...] = ()
    """Who prefilled and who decoded, where the server tells it."""
    is_best_effort: bool = False
    """Served when others left time, as it was predicted to miss its objectives; where the server tells it."""

    def __post_init__(self) -> None:
        # Only the default itself is left out of the file, and JSON has no other NaN.
        for name in ("sent_s", "finished_s"):
            if math.isnan(getattr(self, name)):
                msgspec.structs.force_setattr(self, name, math.nan)

    @property
    def num_output_tokens(self) -> int:
        """Tokens that came."""
        return sum(self.event_tokens)

    @property
    def lateness_s(self) -> float:
        """How late the client itself was in sending."""
        return self.sent_s - self.due_s

    @property
    def ttft_s(self) -> float:
        """Time to first token: sending to the first output; NaN when none came."""
        return self.event_s[0] - self.sent_s if self.event_s else math.nan

    @property
    def tpot_s(self) -> float:
        """Time per output token: (last - first) / (n - 1); NaN for fewer than two tokens, or where it is unknown."""
        later = self.num_output_tokens - 1
        return (self.event_s[-1] - self.event_s[0]) / later if later > 0 and len(self.event_s) > 1 else math.nan

    @property
    def is_tpot_unknown(self) -> bool:
        """True for an answer of several tokens in one event: nobody saw how far apart they were made."""
        return self.num_output_tokens > 1 and len(self.event_s) == 1

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Inter-token latencies: the gap before each event but the first."""
        return tuple(after - before for before, after in pairwise(self.event_s))

    @property
    def e2e_s(self) -> float:
        """Sending to the end of the stream; NaN when it did not end well."""
        return self.finished_s - self.sent_s if self.ending is Ending.FINISHED else math.nan

    def keeps_tpot(self, slo: Slo) -> bool:
        """Return whether the tokens were seen to come fast enough: what is unknown keeps no objective."""
        return slo.tpot_s == math.inf if self.is_tpot_unknown else slo.keeps_tpot(self.tpot_s)

    def meets(self, slo: Slo) -> bool:
        """Return whether it finished and kept both objectives."""
        return self.ending is Ending.FINISHED and slo.is_met(self.ttft_s, self.tpot_s) and self.keeps_tpot(slo)


def write_records(records: Iterable[RequestRecord], path: Path) -> None:
    """Write one JSON line for each request; raise ConfigurationError when the file cannot be written."""
    encoder = msgspec.json.Encoder()
    try:
        with path.open("wb") as file:
            for record in records:
                file.write(encoder.encode(record) + b"\n")
    except OSError as error:
        raise ConfigurationError(f"cannot write the records {path}: {error.strerror}") from error


def read_records(path: Path) -> Iterator[RequestRecord]:
    """Yield what ``write_records`` wrote; raise ConfigurationError, with the line, on anything else."""
    decoder = msgspec.json.Decoder(RequestRecord)
    try:
        with open_text(path) as file:
            for number, line in numbered_lines(file):
                try:
                    yield decoder.decode(line)
                except msgspec.MsgspecError as error:
                    raise ConfigurationError(
                        f"{path}, line {number} is not the record of a request: {error}"
                    ) from error
    except UNREADABLE as error:
        raise ConfigurationError(f"cannot read the records {path}: {error}") from error
