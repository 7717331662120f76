"""The systemd units start commands that exist, with flags and values that they take, and systemd can read them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from disagg.cli.serve import serve

FOLDER = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = sorted(FOLDER.glob("*.service"))
CREDENTIALS = "/run/credentials/unit"
ROLE = "decode"

units = pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)


def lines_of(unit: Path, key: str) -> list[str]:
    return [line.partition("=")[2] for line in unit.read_text().splitlines() if line.startswith(f"{key}=")]


def environment_of(unit: Path) -> dict[str, str]:
    """What the example files beside the units set."""
    required = [Path(file) for file in lines_of(unit, "EnvironmentFile") if not file.startswith("-")]
    pairs = [line for file in required for line in (FOLDER / file.name).read_text().splitlines() if line[:1] != "#"]
    return dict(pair.split("=", 1) for pair in pairs)


def command_of(unit: Path) -> list[str]:
    """What systemd makes of ExecStart: `$NAME` becomes several words, `${NAME}` one."""
    (line,) = lines_of(unit, "ExecStart")
    environment = environment_of(unit)
    words = []
    for word in shlex.split(line.replace("%d", CREDENTIALS).replace("%i", ROLE)):
        if re.fullmatch(r"\$\w+", word):
            words += environment[word[1:]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: environment[match[1]], word))
    return words


@units
def test_the_command_takes_its_flags(unit: Path) -> None:
    program, command, *arguments = command_of(unit)
    assert (program, command) == ("/opt/disagg/bin/disagg", "serve")
    context = serve.make_context("serve", arguments)
    assert context.params["keys"] == CREDENTIALS
    assert context.params["model"] == "/srv/models/SmolLM2-135M-Instruct"


@units
def test_systemd_waits_for_as_long_as_answers_may_take_to_end(unit: Path) -> None:
    (timeout_s,) = lines_of(unit, "TimeoutStopSec")
    context = serve.make_context("serve", command_of(unit)[2:])
    assert int(timeout_s) > context.params["drain_s"]
    assert lines_of(unit, "KillMode") == ["mixed"], "engines are ended by who started them"


def test_each_host_gets_the_keys_that_it_needs_and_no_others() -> None:
    keys = {unit.name: {one.partition(":")[0] for one in lines_of(unit, "LoadCredential")} for unit in UNITS}
    assert keys == {
        "disagg-server.service": {"server.key_secret", "instance.key", "instance.key_secret", "api-keys"},
        "disagg-instance@.service": {"server.key", "instance.key_secret"},
    }


@units
def test_systemd_reads_the_unit(unit: Path, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / unit.name.replace("@", f"@{ROLE}")
    copy.write_text(unit.read_text().replace("/opt/disagg/bin/disagg", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
