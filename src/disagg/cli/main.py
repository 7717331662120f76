"""``disagg``: the list of sub-commands. Each is imported when it is called, so that ``disagg --help`` is quick."""

import importlib
from typing import Final

import click

import disagg
from disagg.base.errors import ConfigurationError, DisaggError
from disagg.cli.values import CommandGroup

COMMANDS: Final = {
    "serve": ("disagg.cli.serve", "Serve a model, with prefill and decode on separate instances."),
    "chat": ("disagg.cli.chat", "Talk to a running server in the terminal."),
    "top": ("disagg.cli.top", "Watch a running server: load, hand-overs, latencies, stages."),
    "ctl": ("disagg.cli.ctl", "Change a running server: add, drain, remove or flip an instance."),
    "doctor": ("disagg.cli.doctor", "Measure a running server's links between prefill and decode."),
    "audit": (
        "disagg.cli.audit",
        "Count the KV blocks of a running server, and name each that is not where the books say.",
    ),
    "simulate": ("disagg.cli.simulate", "Predict what a placement does under a workload."),
    "plan": ("disagg.cli.plan", "Find the placement that serves the most within latency objectives."),
    "profile": ("disagg.cli.profile", "Measure this machine's steps, for simulations of it."),
    "bench": ("disagg.cli.bench", "Measure the engine on this machine."),
    "keys": ("disagg.cli.keys", "Make the keys with which hosts of one deployment know each other."),
    "models": ("disagg.cli.models", "List the models that can be loaded."),
    "version": ("disagg.cli.version", "Print the version."),
}
"""Name, module (which has a command of that name) and one line of help."""

FAILURE_STATUS: Final = 1
CONFIGURATION_STATUS: Final = 2


class CliError(click.ClickException):
    """What a user is told instead of a traceback."""

    exit_code = FAILURE_STATUS

    def show(self, file: object = None) -> None:
        """Print ``error: ...`` on stderr."""
        click.echo(f"error: {self.message}", err=True)


class CliConfigurationError(CliError):
    """A setting, flag or file that cannot be used."""

    exit_code = CONFIGURATION_STATUS


class Commands(CommandGroup):
    """A group whose commands are imported on demand, and whose errors are words unless ``--debug`` is given."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they are helpful."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(COMMANDS[cmd_name][0]), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> object:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except DisaggError as error:
            if ctx.params["debug"]:
                raise
            kind = CliConfigurationError if isinstance(error, ConfigurationError) else CliError
            raise kind(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(disagg.__version__, prog_name="disagg")
@click.option("--debug", is_flag=True, help="Show tracebacks and debugging messages.")
def main(debug: bool) -> None:
    """LLM serving with disaggregated prefill and decode."""


if __name__ == "__main__":
    main()
