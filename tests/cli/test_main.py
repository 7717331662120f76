"""The command as a whole: help, errors, exit status."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

import disagg
from disagg.base.errors import ConfigurationError, UnavailableError
from disagg.cli import main as cli
from disagg.cli.main import COMMANDS, main


def test_help_names_every_command_and_imports_none():
    program = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from disagg.cli.main import main\n"
        "result = CliRunner().invoke(main, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(result.output)\n"
        "print(*sys.modules)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    *help_lines, modules = output.splitlines()
    assert all(any(line.split()[:1] == [name] for line in help_lines) for name in COMMANDS)
    assert not {"torch", "numpy", "msgspec", "httpx", "uvicorn", "zmq", "rich"} & set(modules.split())
    rooms = {name.split(".")[1] for name in modules.split() if name.startswith("disagg.")}
    assert rooms == {"base", "cli"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert COMMANDS[name][1].split()[0] in result.output


def test_the_version_is_told_in_three_ways():
    run = CliRunner().invoke
    assert disagg.__version__ in run(main, ["--version"]).output
    assert run(main, ["version"]).output.strip() == disagg.__version__
    assert json.loads(run(main, ["version", "--json"]).output)["version"] == disagg.__version__


@pytest.mark.parametrize(("error", "status"), [(ConfigurationError("no such flag"), 2), (UnavailableError("gone"), 1)])
def test_errors_are_one_line_unless_debug_is_on(monkeypatch, error, status):
    @click.command()
    def version() -> None:
        raise error

    monkeypatch.setattr("disagg.cli.version.version", version)
    result = CliRunner().invoke(main, ["version"])
    assert (result.exit_code, result.stderr, result.stdout) == (status, f"error: {error}\n", "")
    assert CliRunner().invoke(main, ["--debug", "version"]).exception is error


def test_an_unknown_command_is_refused():
    result = CliRunner().invoke(main, ["serv"])
    assert result.exit_code == 2
    assert "serv" in result.stderr


def test_the_table_of_commands_is_the_list_of_modules():
    assert cli.main.list_commands(click.Context(cli.main)) == list(COMMANDS)
