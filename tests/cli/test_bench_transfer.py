"""``disagg bench transfer``: a row for each kind of read, beside its limit."""

import json

import pytest
from click.testing import CliRunner

from disagg.cli.main import main

SMALL = ("bench", "transfer", "--tokens", "128", "--reads", "1", "--json")


@pytest.mark.parametrize("more", [(), ("--cpu-time",)], ids=["wall", "cpu"])
def test_every_link_and_form_is_read_with_and_without_digests(more: tuple[str, ...]) -> None:
    ended = CliRunner().invoke(main, [*SMALL, *more])
    assert ended.exit_code == 0, ended.output
    *rows, speeds = (json.loads(line) for line in ended.stdout.splitlines())
    kinds = {(row["link"], row["codec"], row["pieces"], row["digests"]) for row in rows}
    assert {(link, codec) for link, codec, _, _ in kinds} >= {("shm", "raw"), ("tcp", "raw"), ("tcp", "int8")}
    assert len(kinds) == len(rows) == 4 * len({(link, codec) for link, codec, _, _ in kinds})
    assert all(row["bytes_per_s"] > 0 and row["limit_bytes_per_s"] > 0 and row["share"] > 0 for row in rows)
    assert all(speed > 0 for speed in speeds.values())
