"""Records as Parquet, for pandas, DuckDB and the like. Needs pyarrow, the optional extra ``parquet``."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.measure.record import RequestRecord


def check_parquet(path: Path) -> None:
    """Raise ConfigurationError without pyarrow: before a run rather than after it."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ConfigurationError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'disagg[parquet]', or write .jsonl"
        ) from error


def write_parquet(records: Sequence[RequestRecord], path: Path) -> None:
    """Write one row for each request, with the fields of RequestRecord and its latencies in seconds.

    Raises ConfigurationError without pyarrow, or when the file cannot be written.
    """
    check_parquet(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = RequestRecord.__struct_fields__
    columns = {name: [_plain(getattr(record, name)) for record in records] for name in names}
    for latency in ("lateness_s", "ttft_s", "tpot_s", "e2e_s"):
        columns[latency] = [getattr(record, latency) for record in records]
    types = {
        "event_s": pa.list_(pa.float64()),
        "event_tokens": pa.list_(pa.int32()),
        "stages": pa.map_(pa.string(), pa.float64()),
        "instances": pa.list_(pa.string()),
    }
    table = pa.table({name: pa.array(column, types.get(name)) for name, column in columns.items()})
    try:
        pq.write_table(table, path, compression="zstd")
    except OSError as error:
        raise ConfigurationError(f"cannot write the records {path}: {error}") from error


def _plain(value: object) -> object:
    """Return what pyarrow takes: a map as pairs, an ending as its name."""
    plain = msgspec.to_builtins(value)
    return list(plain.items()) if isinstance(plain, dict) else plain
