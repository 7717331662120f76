"""Rows of trace files in the formats that people publish: one line, one request.

- JSON lines in Mooncake's words: ``input_length``, ``output_length``, ``timestamp`` (ms) and, where they are known,
  ``hash_ids``, one for each block of 512 tokens of the prompt; gzipped where the name ends in ``.gz``.
- CSV in DistServe's words, ``prompt_len, output_len`` and ``arrival_s``; in Azure's, ``ContextTokens,
  GeneratedTokens`` and ``TIMESTAMP`` (a date and time, of 2023 without and of 2024 with a time zone); in Vidur's,
  ``num_prefill_tokens, num_decode_tokens``.

In all of them ``service_class`` may name a class of service. Other fields and columns are ignored.

Blank lines and a byte order mark say nothing. Every number is finite and within ``MAX_TOKENS`` or ``LATEST_S``.
"""

import csv
import datetime
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, TextIO

import msgspec
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.measure.workload import NO_PREFIX, PrefixBlocks, RequestSpec

MOONCAKE_BLOCK_TOKENS: Final = 512
MAX_TOKENS: Final = 1 << 24
"""No model's context is longer."""
LATEST_S: Final = 1e10
"""The year 2286 as Unix time. Beyond it a float no longer tells microseconds apart."""

TokenCount = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
PromptTokens = Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
Milliseconds = Annotated[float, Meta(ge=0, le=LATEST_S * 1e3)]
BlockId = Annotated[int, Meta(ge=0, lt=1 << 62)]


class _MooncakeRow(msgspec.Struct, frozen=True):
    """A line of a JSON trace; fields of other names are ignored."""

    input_length: PromptTokens
    # Traces hold answers of no token at all.
    output_length: TokenCount
    timestamp: Milliseconds | None = None
    hash_ids: tuple[BlockId, ...] = ()
    service_class: Annotated[str, Meta(max_length=64)] = ""
    session_id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.session_id is not msgspec.UNSET:
            raise ValueError("it is a call of a session, which waits for others: give the file with --sessions")
        num_blocks = -(-self.input_length // MOONCAKE_BLOCK_TOKENS)
        if self.hash_ids and len(self.hash_ids) != num_blocks:
            raise ValueError(
                f"{len(self.hash_ids)} hash_ids for {self.input_length} tokens: one for each block of "
                f"{MOONCAKE_BLOCK_TOKENS} tokens, that is {num_blocks}"
            )


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns of a CSV file hold what, and how its times are written."""

    prompt: str
    output: str
    time: str
    to_seconds: Callable[[str], float]


def iso_seconds(text: str) -> float:
    """Return the Unix time of a date and time, UTC where it names no zone. Raises ValueError when it is none."""
    moment = datetime.datetime.fromisoformat(text.strip())
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


_CSV_FORMATS: Final = (
    _Columns("prompt_len", "output_len", "arrival_s", float),
    _Columns("ContextTokens", "GeneratedTokens", "TIMESTAMP", iso_seconds),
    _Columns("num_prefill_tokens", "num_decode_tokens", "arrived_at", float),
)


def read_rows(path: Path) -> Iterator[RequestSpec]:
    """Yield the requests of a file, their times as written there, in seconds; NaN where it gives none.

    An answer of no token is read as one of one token: the least that can be served. Raises ConfigurationError with the
    line when the file is no trace or a value cannot be.
    """
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".csv")):
        raise ConfigurationError(f"{path} is no trace: neither .jsonl nor .csv, nor one of them gzipped (.gz)")
    try:
        with open_text(path) as lines:
            yield from _json_rows(path, lines) if name.endswith(".jsonl") else _csv_rows(path, lines)
    except UNREADABLE as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error}") from error


UNREADABLE: Final = (OSError, EOFError, UnicodeDecodeError, zlib.error, csv.Error)
"""What reading a file of ``open_text`` raises when it is not there, or not what its name says."""


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped or not, behind its byte order mark if it has one."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8-sig") as lines:
            yield lines
    else:
        with path.open(encoding="utf-8-sig") as lines:
            yield lines


def numbered_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers from 1."""
    return ((number, line) for number, line in enumerate(lines, start=1) if not line.isspace())


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[RequestSpec]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in numbered_lines(lines):
        try:
            row = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(
                f"{path}, line {number}: {error}: a row has input_length and output_length, and timestamp in ms where "
                "it is known; sessions are given with --sessions"
            ) from error
        yield RequestSpec(
            prompt_len=row.input_length,
            output_len=max(1, row.output_length),
            arrival_s=math.nan if row.timestamp is None else row.timestamp * 1e-3,
            prefix=PrefixBlocks(row.hash_ids, MOONCAKE_BLOCK_TOKENS) if row.hash_ids else NO_PREFIX,
            line=number,
            service_class=row.service_class,
        )


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[RequestSpec]:
    reader = csv.DictReader(lines)
    present = set(reader.fieldnames or ())
    columns = next((columns for columns in _CSV_FORMATS if {columns.prompt, columns.output} <= present), None)
    if columns is None:
        known = "; ".join(f"{columns.prompt},{columns.output}" for columns in _CSV_FORMATS)
        raise ConfigurationError(f"{path} has no pair of columns for prompt and output length: {known}")
    for fields in reader:
        yield _csv_row(path, reader.line_num, fields, columns)


def _csv_row(path: Path, line: int, fields: Mapping[str, str], columns: _Columns) -> RequestSpec:
    has_time = columns.time in fields
    try:
        prompt_len, output_len = int(fields[columns.prompt]), int(fields[columns.output])
        arrival_s = columns.to_seconds(fields[columns.time]) if has_time else math.nan
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ConfigurationError(f"{path}, line {line}: {error} in {dict(fields)}") from error
    if not (1 <= prompt_len <= MAX_TOKENS and 0 <= output_len <= MAX_TOKENS):
        raise ConfigurationError(
            f"{path}, line {line}: {prompt_len} prompt and {output_len} output tokens cannot be: from 1, or 0, to "
            f"{MAX_TOKENS}"
        )
    if has_time and not 0 <= arrival_s <= LATEST_S:
        raise ConfigurationError(
            f"{path}, line {line}: arrival at {arrival_s} s is {'negative' if arrival_s < 0 else 'no time'}; times are "
            f"from 0 to {LATEST_S:g} s"
        )
    return RequestSpec(
        prompt_len=prompt_len,
        output_len=max(1, output_len),
        arrival_s=arrival_s,
        line=line,
        service_class=fields.get("service_class") or "",
    )
