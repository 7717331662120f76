"""What ``disagg serve`` shows: progress while instances load, then where it listens, then what happens.

Words for people go to stderr; stdout is for the one JSON line of ``--json``.
"""

import json
import time
from itertools import zip_longest

import click

import disagg
from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.base.text import one_line
from disagg.base.units import format_bytes
from disagg.serve.router.interface import InstanceStatus


class PlainDisplay:
    """A ServerObserver that writes lines."""

    def __init__(self, *, as_json: bool, started_s: float) -> None:
        self._as_json = as_json
        self._started_s = started_s
        self._stages: dict[InstanceId, str] = {}
        self._were_ready: set[InstanceId] = set()
        self._can_chat = True

    def model_read(self, model: str, *, can_chat: bool) -> None:
        """See ServerObserver."""
        self._can_chat = can_chat

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See ServerObserver: each new stage is a line."""
        if self._stages.get(instance) != stage:
            self._stages[instance] = stage
            say(f"{instance}: loading {stage}")

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See ServerObserver."""
        self._stages.pop(instance, None)
        again = ", serving again" if instance in self._were_ready else ""
        self._were_ready.add(instance)
        say(f"{instance}: ready after {facts.load_s:.1f} s{again}")

    def instance_line(self, instance: InstanceId, line: str) -> None:
        """See ServerObserver."""
        say(f"[{instance}] {one_line(line)}")

    def instance_lost(self, instance: InstanceId, how: str, restart_in_s: float | None) -> None:
        """See ServerObserver."""
        if restart_in_s is None:
            what = "it is given up"
        else:
            what = f"restarting it in {restart_in_s:g} s" if restart_in_s else "restarting it"
        say(f"{instance} died: {how}; {what}")

    def instance_left(self, instance: InstanceId) -> None:
        """See ServerObserver."""
        self._stages.pop(instance, None)
        say(f"{instance}: removed")

    def server_ready(self, url: str, model: str, instances: tuple[InstanceStatus, ...]) -> None:
        """See ServerObserver."""
        took_s = time.monotonic() - self._started_s
        if self._as_json:
            click.echo(json.dumps(_ready_message(url, model, instances, took_s)))
        say(f"\ndisagg {disagg.__version__} serves {model} on {url} (ready after {took_s:.1f} s)\n")
        self.show_instances(instances)
        if self._can_chat:
            chat = "disagg chat" if url.endswith(":8000") else f"disagg chat --url {url}"
            say(f"\nTry:\n  {_chat_call(url, model)}\nor: {chat}\n")
        else:
            say(f"\nIt has no chat template, so it completes texts. Try:\n  {_completion_call(url, model)}\n")

    def server_stopping(self, why: str, drain_s: float) -> None:
        """See ServerObserver."""
        say(f"{why}: stopping; requests under way have {drain_s:g} s to finish (once more ends it at once)")

    def show_instances(self, instances: tuple[InstanceStatus, ...]) -> None:
        """Write the instances, one a line."""
        rows = [instance_columns(), *(instance_row(status) for status in instances)]
        widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
        for row in rows:
            cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
            say("  " + "  ".join(cells).rstrip())

    def close(self) -> None:
        """End the display."""


def say(line: str) -> None:
    """Write a line for people."""
    click.echo(line, err=True)


def instance_columns() -> tuple[str, ...]:
    """Return the names of the columns of ``instance_row``."""
    return ("instance", "role", "pid", "device", "kernels", "KV pool", "longest")


def instance_row(status: InstanceStatus) -> tuple[str, ...]:
    """Return what there is to say about a ready instance."""
    facts = status.facts
    if facts is None:
        return (status.instance, status.role.value, status.state.value)
    of_what = f"x {facts.block_size} tokens" if facts.window is None else "blocks"  # some hold other layers alone
    pool = f"{facts.num_blocks} {of_what}, {format_bytes(facts.kv_bytes)}"
    return (
        status.instance,
        status.role.value,
        str(facts.pid),
        facts.device,
        facts.kernel_backend,
        pool,
        f"{facts.max_model_len} tokens",
    )


def _ready_message(url: str, model: str, instances: tuple[InstanceStatus, ...], took_s: float) -> dict[str, object]:
    return {
        "url": url,
        "model": model,
        "version": disagg.__version__,
        "ready_after_s": round(took_s, 3),
        "instances": [
            {
                "instance": status.instance,
                "role": status.role.value,
                "pid": status.facts.pid if status.facts else None,
                "max_model_len": status.facts.max_model_len if status.facts else None,
            }
            for status in instances
        ],
    }


def _chat_call(url: str, model: str) -> str:
    message = {"role": "user", "content": "Name three rivers."}
    return _call(f"{url}/v1/chat/completions", {"model": model, "messages": [message]})


def _completion_call(url: str, model: str) -> str:
    body = {"model": model, "prompt": "Three rivers of Europe are", "max_tokens": 32}
    return _call(f"{url}/v1/completions", body)


def _call(url: str, body: dict[str, object]) -> str:
    return f"curl {url} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
