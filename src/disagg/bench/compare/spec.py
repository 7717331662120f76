"""What is to be compared, as a YAML file: systems, and the loads that each of them is put under."""

import os
import shlex
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import yaml
from msgspec import Meta

from disagg.base.errors import ConfigurationError
from disagg.base.known_names import closest, known_names
from disagg.base.structs import read_struct
from disagg.measure.slo import parse_slo
from disagg.measure.standard import SloKind

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Cores = tuple[Annotated[int, Meta(ge=0)], ...]

PORT: Final = "{port}"
"""Stands for a free port in commands and addresses."""
DERIVED_SLOS: Final = tuple(kind.value for kind in SloKind)


class SystemSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server: ``serve``, flags of ``disagg serve``, or ``command``, any other that speaks OpenAI's API.

    In ``command`` and ``environment`` a ``$NAME`` is an environment variable and ``{port}`` the port to listen on.
    """

    name: str
    serve: str | None = None
    command: str | None = None
    environment: dict[str, str] = {}
    url: str = "http://127.0.0.1:{port}"
    ready: str = "/v1/models"
    """Path that answers 200 once the server can serve."""
    start_deadline_s: Annotated[float, Meta(gt=0)] = 300.0
    devices: Count | None = None
    """By which goodput is divided; the number of the servers' cores unless given."""

    def __post_init__(self) -> None:
        if (self.serve is None) == (self.command is None):
            raise ValueError(f"system {self.name!r} needs either `serve` (flags of disagg serve) or `command`")
        if self.command is not None and PORT in self.url and PORT not in f"{self.command} {self.environment}":
            raise ValueError(f"system {self.name!r}: nothing tells its `command` the {PORT} that its `url` has")


class _Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What all loads have."""

    slo: tuple[str, ...] = ()
    """Objectives by which the runs are judged, each: ``ttft=..,tpot=..``, or ``tight`` or ``loose``: a multiple of what
    the first system needs for one request on its own."""

    def __post_init__(self) -> None:
        for text in self.slo:
            if text not in DERIVED_SLOS:
                try:
                    parse_slo(text)
                except ConfigurationError as error:
                    meant = "".join(f"; did you mean {name}?" for name in closest(text, DERIVED_SLOS, 1))
                    raise ValueError(f"{error}; or one of {', '.join(DERIVED_SLOS)}{meant}") from error


class _TrafficCase(_Case, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests of a workload (a standard one's name, or a trace file), or all of equal lengths."""

    workload: str | None = None
    prompt_len: Count | None = None
    output_len: Count | None = None
    requests: Count
    traces: str | None = None
    """Folder of trace files that a standard workload replays, rather than to draw from fitted lengths."""
    shorten: Annotated[float, Meta(gt=0, le=1)] | None = None
    max_total_len: Annotated[int, Meta(ge=2)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.workload is None) == (self.prompt_len is None or self.output_len is None):
            raise ValueError("a case needs either `workload`, or both `prompt_len` and `output_len`")


class OpenLoopCase(_TrafficCase, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="open_loop"):
    """Requests come at ``rates`` (requests/s), one run for each, whatever becomes of those before them."""

    rates: Annotated[tuple[Annotated[float, Meta(gt=0)], ...], Meta(min_length=1)]


class ClosedLoopCase(_TrafficCase, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="closed_loop"):
    """So many ``users`` at once, one run for each, and each asks again as soon as it is answered."""

    users: Annotated[tuple[Count, ...], Meta(min_length=1)]


class SingleStreamCase(_Case, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="single_stream"):
    """One request at a time, at each of some prompt lengths: TTFT and TPOT of an idle server."""

    prompt_lens: Annotated[tuple[Count, ...], Meta(min_length=1)]
    output_len: Count = 64
    requests: Count = 5


Case = OpenLoopCase | ClosedLoopCase | SingleStreamCase


class Pinning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Cores. Empty: all that there are."""

    servers: Cores = ()
    client: Cores = ()


class ComparisonSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A comparison. The first system is what the others are compared with."""

    title: str = "Comparison"
    model: str | None = None
    """Whose tokenizer makes the prompts, and what our own servers serve."""
    systems: Annotated[tuple[SystemSpec, ...], Meta(min_length=1)]
    cases: Annotated[tuple[Case, ...], Meta(min_length=1)]
    cpus: Pinning = Pinning()
    repeats: Count = 2
    """Of everything; the order of the systems is reversed each time, and every repeat has requests of its own."""
    seed: int = 0
    cool_down_s: Seconds = 5.0
    """Between one server's end and the next one's start."""
    settle_s: Seconds = 3.0
    """Between a server's being ready and its first request: what starts in the background is not measured."""
    request_timeout_s: Annotated[float, Meta(gt=0)] = 300.0
    longest_run_s: Annotated[float, Meta(gt=0)] = 900.0
    """What has not ended by then counts as a miss."""

    def __post_init__(self) -> None:
        names = [system.name for system in self.systems]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`systems` has two of the name {twice[0]!r}")


def read_spec(path: Path) -> ComparisonSpec:
    """Read a comparison; raise ConfigurationError, naming file and key, when it is none."""
    try:
        return read_struct(yaml.safe_load(path.read_text(encoding="utf-8-sig")), ComparisonSpec)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the comparison {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError, ConfigurationError) as error:
        raise ConfigurationError(f"{path} is not a comparison: {error}") from error


def choose_systems(spec: ComparisonSpec, names: Sequence[str]) -> ComparisonSpec:
    """Return the comparison of these systems alone, in the order of ``names``.

    Raises ConfigurationError for a name that it does not have.
    """
    systems = {system.name: system for system in spec.systems}
    for name in names:
        if name not in systems:
            raise ConfigurationError(f"no system is called {name!r}; {known_names(name, systems)}")
    return msgspec.structs.replace(spec, systems=tuple(systems[name] for name in dict.fromkeys(names)))


def split_command(command: str, port: int, variables: Mapping[str, str] = os.environ) -> list[str]:
    """Return a command's words, with variables and port filled in.

    Raises ConfigurationError when it names a variable that is not set, or its quotes are not closed.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ConfigurationError(f"the command {command!r} cannot be split into words: {error}") from error
    return [fill_in(word, port, variables) for word in words]


def fill_in(text: str, port: int, variables: Mapping[str, str] = os.environ) -> str:
    """Return ``text`` with ``$NAME``, ``${NAME}`` and ``{port}`` filled in; ``$$`` is a dollar sign.

    Raises ConfigurationError for a variable that is not set.
    """
    try:
        filled = string.Template(text).substitute(variables)
    except KeyError as error:
        raise ConfigurationError(f"{text!r} names the variable {error.args[0]}, which is not set: export it") from error
    except ValueError as error:
        raise ConfigurationError(f"{text!r} has a $ that begins no variable: write $$ for a dollar sign") from error
    return filled.replace(PORT, str(port))


def case_words(case: Any) -> str:
    """Return what a case's requests are, for headings."""
    if isinstance(case, SingleStreamCase):
        return "One request at a time"
    return case.workload or f"{case.prompt_len} tokens in, {case.output_len} out"
