"""What a test of the API holds: a server's address, its scripted router, and the official client."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import openai
from scripted_router import ScriptedRouter

ANSWER = "The Rhine, the Danube and the Elbe. Größe: 10 €."
EOS = 2


@dataclass
class Site:
    """A running server."""

    url: str
    router: ScriptedRouter
    client: openai.AsyncOpenAI


Serve = Callable[..., Awaitable[Site]]
