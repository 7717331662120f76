"""Reading a sequence's stream as the API does, for tests that want its outputs one by one."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

from disagg.base.messages import SequenceOutput
from disagg.serve.router.interface import SequenceStream

_taken: WeakKeyDictionary[SequenceStream, deque[SequenceOutput]] = WeakKeyDictionary()
"""What was taken from a stream and not yet yielded."""


async def outputs(stream: SequenceStream) -> AsyncIterator[SequenceOutput]:
    """Yield what comes until the stream ends; raise what it ended with. Another call goes on where this one was."""
    news = asyncio.Event()
    stream.listen(news.set)
    waiting = _taken.setdefault(stream, deque())
    while True:
        while waiting:
            yield waiting.popleft()
        news.clear()
        waiting += stream.take()
        if waiting:
            continue
        if stream.is_ended:
            return
        await news.wait()
