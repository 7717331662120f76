"""Requests that come before any instance is ready wait for one."""

import asyncio

from api_site import Serve
from raw_client import completion, connected


async def test_a_request_waits_for_the_first_instance(serve: Serve) -> None:
    site = await serve(live=False)
    asking = asyncio.create_task(site.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3}))
    async with connected(site) as client:
        await client.send(completion(stream=True))
        assert (await site.http.get("/health")).status_code == 200
        assert (await site.http.get("/ready")).status_code == 503
        assert not asking.done()
        site.router.come_alive()
        assert (await asking).status_code == 200
        await client.read_until(b"[DONE]")


async def test_those_that_wait_are_bounded(serve: Serve) -> None:
    site = await serve(live=False)
    waiting = [asyncio.create_task(site.http.post("/v1/completions", json={"prompt": "x"})) for _ in range(4)]
    done, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    assert [task.result().status_code for task in done] == [429]
    site.router.come_alive()
    assert [response.status_code for response in await asyncio.gather(*pending)] == [200] * 3
