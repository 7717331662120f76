"""Rows of trace files in the formats that people publish: one line, one request.

- JSON lines in Mooncake's words: ``input_length``, ``output_length``, ``timestamp`` (ms) and ``hash_ids`` of the
  prompt's 512-token blocks where they are known; gzipped where the name ends in ``.gz``.
- CSV in DistServe's words, ``prompt_len, output_len`` and ``arrival_s``; in Azure's, ``ContextTokens,
  GeneratedTokens`` and ``TIMESTAMP``; in Vidur's, ``num_prefill_tokens, num_decode_tokens``. Other columns are ignored.
"""

import csv
import datetime
import gzip
import math
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


class _MooncakeRow(msgspec.Struct, frozen=True):
    """A line of a JSON trace; fields of other names are ignored."""

    input_length: Annotated[int, Meta(ge=1)]
    # Traces hold answers of no token at all.
    output_length: Annotated[int, Meta(ge=0)]
    timestamp: Annotated[float, Meta(ge=0)] | None = None
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Columns:
    """Which columns of a CSV file hold what, and how its times are written."""

    prompt: str
    output: str
    time: str
    to_seconds: Callable[[str], float]


def _azure_seconds(text: str) -> float:
    # Azure writes seven digits of a second; datetime takes six.
    head, _, fraction = text.partition(".")
    moment = datetime.datetime.fromisoformat(head).replace(tzinfo=datetime.UTC)
    return moment.timestamp() + float(f"0.{fraction or 0}")


_CSV_FORMATS: Final = (
    _Columns("prompt_len", "output_len", "arrival_s", float),
    _Columns("ContextTokens", "GeneratedTokens", "TIMESTAMP", _azure_seconds),
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
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error}") from error


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a text file, gzipped or not."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield lines
    else:
        with path.open(encoding="utf-8") as lines:
            yield lines


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[RequestSpec]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in enumerate(lines, start=1):
        try:
            row = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(
                f"{path}, line {number}: {error}: a row has input_length and output_length, and timestamp in ms where "
                "it is known"
            ) from error
        yield RequestSpec(
            prompt_len=row.input_length,
            output_len=max(1, row.output_length),
            arrival_s=math.nan if row.timestamp is None else row.timestamp * 1e-3,
            prefix=PrefixBlocks(row.hash_ids, MOONCAKE_BLOCK_TOKENS) if row.hash_ids else NO_PREFIX,
            line=number,
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
    try:
        prompt_len, output_len = int(fields[columns.prompt]), int(fields[columns.output])
        arrival_s = columns.to_seconds(fields[columns.time]) if columns.time in fields else math.nan
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{path}, line {line}: {error} in {dict(fields)}") from error
    if prompt_len < 1 or output_len < 0:
        raise ConfigurationError(f"{path}, line {line}: {prompt_len} prompt and {output_len} output tokens cannot be")
    if arrival_s < 0:
        raise ConfigurationError(f"{path}, line {line}: arrival at {arrival_s} s is negative; times start at 0")
    return RequestSpec(prompt_len=prompt_len, output_len=max(1, output_len), arrival_s=arrival_s, line=line)
