"""What a test of the API holds: a server's address, its scripted router, and clients for it."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families
from scripted_router import ScriptedRouter

ANSWER = "The Rhine, the Danube and the Elbe. Größe: 10 €."
BOS, EOS = 256, 257


def ids_of(text: str) -> list[int]:
    """Token ids of a text: the test tokenizer has one token for each byte."""
    return list(text.encode())


@dataclass
class Site:
    """A running server. ``http`` and ``client`` send its key, where it has one."""

    url: str
    router: ScriptedRouter
    client: openai.AsyncOpenAI
    http: httpx.AsyncClient

    async def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric over all label sets that contain ``labels``."""
        families = text_string_to_metric_families((await self.http.get("/metrics")).text)
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    async def wait_for_metric(self, name: str, value: float, **labels: str) -> None:
        """Scrape until a metric has a value."""
        async with asyncio.timeout(20):
            while await self.metric(name, **labels) != value:
                await asyncio.sleep(0)


Serve = Callable[..., Awaitable[Site]]
