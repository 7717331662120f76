"""One scrape for a whole server: what each router has counted, put together."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from disagg.base.ids import RouterId
from disagg.serve.launch.fleet_messages import AllMetrics, GiveMetrics, MetricsGiven
from disagg.serve.launch.router_child import RouterChild

GATHER_S: Final = 2.0
"""A router that is slower is left out of a scrape."""


class MetricsGathering:
    """The scrapes under way. ``of_fleet`` returns what the process that keeps the instances has counted itself."""

    def __init__(self, of_fleet: Callable[[], bytes]) -> None:
        self._of_fleet = of_fleet
        self._number = 0
        self._given: dict[int, dict[RouterChild, MetricsGiven]] = {}
        self._missing: dict[int, set[RouterChild]] = {}
        self._complete: dict[int, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def gather(self, asker: RouterChild, asked: int, routers: Sequence[RouterChild]) -> None:
        """Ask all routers, and answer ``asker`` once they have answered, or have had time to."""
        self._number += 1
        number = self._number
        self._given[number], self._missing[number] = {}, set(routers)
        self._complete[number] = asyncio.Event()
        for child in routers:
            child.tell(GiveMetrics(number=number))
        task = asyncio.create_task(self._answer(asker, asked, number), name="metrics of all routers")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take(self, child: RouterChild, message: MetricsGiven) -> None:
        """Take one router's answer; nobody waits for what comes too late."""
        missing = self._missing.get(message.number)
        if missing is None or child not in missing:
            return
        missing.remove(child)
        self._given[message.number][child] = message
        if not missing:
            self._complete[message.number].set()

    async def _answer(self, asker: RouterChild, asked: int, number: int) -> None:
        try:
            await asyncio.wait_for(self._complete[number].wait(), GATHER_S)
        except TimeoutError:
            pass
        finally:
            given = self._given.pop(number)
            del self._missing[number], self._complete[number]
        text = merge({child.name: said for child, said in given.items()})
        asker.tell(AllMetrics(number=asked, text=text + self._of_fleet()))


def merge(given: Mapping[RouterId, MetricsGiven]) -> bytes:
    """Put expositions in Prometheus' text format together: the samples of a metric stand behind one head.

    Those that routers count are told apart by the label ``router``; what instances say is taken from the first.
    """
    heads: dict[bytes, list[bytes]] = {}
    samples: dict[bytes, list[bytes]] = {}
    for router, said in sorted(given.items()):
        name = b""
        for line in said.text.splitlines():
            if line.startswith(b"# HELP "):
                name = line.split(b" ", 3)[2]
                heads.setdefault(name, [])
            if not line.startswith(b"#"):
                samples.setdefault(name, []).append(_labelled(line, router.encode()))
            elif line not in heads[name]:
                heads[name].append(line)
    lines = [line for name, head in heads.items() for line in (*head, *samples.get(name, ()))]
    first = min(given, default=None)
    return b"".join(line + b"\n" for line in lines) + (b"" if first is None else given[first].of_instances)


def _labelled(sample: bytes, router: bytes) -> bytes:
    """Add the label to a line such as ``name{a="b"} 1.0`` or ``name 1.0``."""
    mark = b"{" if b"{" in sample else b" "
    name, rest = sample.split(mark, 1)
    return name + b'{router="' + router + (b'",' + rest if mark == b"{" else b'"} ' + rest)
