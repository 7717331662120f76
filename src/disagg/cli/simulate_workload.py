"""Workload files for ``disagg simulate``: who arrives when, with how many tokens.

- ``.csv`` with the columns ``arrival_s, prompt_len, output_len``; others are ignored.
- ``.jsonl`` or ``.jsonl.gz`` with ``input_length`` and ``output_length``, ``timestamp`` in ms, and ``hash_ids`` of the
  prompt's 512-token blocks (Mooncake's format). Rows without timestamps are lengths alone: arrivals are then drawn
  from a Poisson process, with a seed.
"""

import csv
import gzip
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from disagg.base.errors import ConfigurationError
from disagg.base.ids import BlockHash, RequestId
from disagg.simulator.request import SimulatedRequest

HASH_BLOCK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a file; ``arrival_s`` is NaN where the file gives no times."""

    line: int
    arrival_s: float
    prompt_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


class Workload:
    """The requests of one file. They can be drawn any number of times."""

    def __init__(self, path: Path, num_requests: int | None = None) -> None:
        """Read the file; raise ConfigurationError, with the line, when it is none or a value cannot be."""
        self._name = path.name
        rows = []
        for row in _read(path):
            rows.append(row)
            if len(rows) == num_requests:
                break
        if not rows:
            raise ConfigurationError(f"{path} holds no requests")
        self._rows = rows
        self.has_times = not math.isnan(rows[0].arrival_s)
        if self.has_times:
            self._check_order(path)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rate(self) -> float:
        """Mean arrival rate of the file in requests/s; NaN without times, infinite when all come at once."""
        if not self.has_times:
            return math.nan
        span_s = self._rows[-1].arrival_s - self._rows[0].arrival_s
        return (len(self._rows) - 1) / span_s if span_s > 0 else math.inf

    def draw(self, seed: int, rate: float | None, block_size: int) -> Iterator[SimulatedRequest]:
        """Return the requests at ``rate`` requests/s: the file's times stretched, or a Poisson process.

        Without a rate the file's own times are kept.
        """
        for number, (arrival_s, row) in enumerate(zip(self._arrivals(seed, rate), self._rows, strict=True)):
            yield SimulatedRequest(
                request_id=RequestId(f"{self._name}:{row.line}" if row.line else f"{self._name}#{number}"),
                arrival_s=arrival_s,
                prompt_len=row.prompt_len,
                output_len=row.output_len,
                block_hashes=_block_hashes(row, block_size),
            )

    def _arrivals(self, seed: int, rate: float | None) -> Iterator[float]:
        if self.has_times:
            start_s = self._rows[0].arrival_s
            factor = 1.0 if rate is None else self.rate / rate
            yield from ((row.arrival_s - start_s) * factor for row in self._rows)
            return
        if rate is None:
            raise ConfigurationError(f"{self._name} gives lengths but no arrival times: give --rate")
        rng = random.Random(seed)
        time_s = 0.0
        for _ in self._rows:
            time_s += rng.expovariate(rate)
            yield time_s

    def _check_order(self, path: Path) -> None:
        latest_s = -math.inf
        for row in self._rows:
            if not row.arrival_s >= latest_s:
                raise ConfigurationError(
                    f"{path}, line {row.line}: arrival at {row.arrival_s} s is before that of the line before, "
                    f"{latest_s} s: sort the file, and give one run at a time"
                )
            latest_s = row.arrival_s


def _read(path: Path) -> Iterator[Row]:
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8") as lines:
                yield from _csv_rows(path, lines)
        elif path.name.endswith(".jsonl.gz"):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                yield from _json_rows(path, lines)
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as lines:
                yield from _json_rows(path, lines)
        else:
            raise ConfigurationError(f"{path} is neither .csv nor .jsonl nor .jsonl.gz: see disagg simulate --help")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the workload {path}: {error}") from error


def _csv_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    reader = csv.DictReader(lines)
    needed = {"arrival_s", "prompt_len", "output_len"}
    if missing := needed - set(reader.fieldnames or ()):
        raise ConfigurationError(f"{path} has no column {', '.join(sorted(missing))}")
    for fields in reader:
        yield _row(path, reader.line_num, fields, ("arrival_s", "prompt_len", "output_len"), 1.0)


def _json_rows(path: Path, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{path}, line {number} is not JSON: {error}") from error
        yield _row(path, number, fields, ("timestamp", "input_length", "output_length"), 1e-3)


def _row(path: Path, line: int, fields: Any, names: tuple[str, str, str], unit_s: float) -> Row:
    time_name, prompt_name, output_name = names
    try:
        row = Row(
            line=line,
            arrival_s=float(fields.get(time_name, math.nan)) * unit_s,
            prompt_len=int(fields[prompt_name]),
            # Traces hold answers of no token at all; one is the least that can be served.
            output_len=max(1, int(fields[output_name])),
            hash_ids=tuple(fields.get("hash_ids") or ()),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigurationError(f"{path}, line {line}: {type(error).__name__} {error} in {fields!r}") from error
    if row.prompt_len < 1 or int(fields[output_name]) < 0:
        raise ConfigurationError(f"{path}, line {line}: a request of {row.prompt_len} prompt tokens cannot be")
    if row.arrival_s < 0:
        raise ConfigurationError(f"{path}, line {line}: arrival at {row.arrival_s} s is negative; times start at 0")
    return row


def _block_hashes(row: Row, block_size: int) -> tuple[BlockHash, ...]:
    """Return a name for each full KV block, equal where all ids up to it are equal."""
    if not row.hash_ids:
        return ()
    chain = []
    digest = b""
    for hash_id in row.hash_ids:
        digest = hashlib.blake2b(digest + hash_id.to_bytes(8, "little"), digest_size=12).digest()
        chain.append(digest)
    num_blocks = min(row.prompt_len, len(chain) * HASH_BLOCK_TOKENS) // block_size
    return tuple(
        BlockHash(chain[((index + 1) * block_size - 1) // HASH_BLOCK_TOKENS] + index.to_bytes(4, "little"))
        for index in range(num_blocks)
    )
