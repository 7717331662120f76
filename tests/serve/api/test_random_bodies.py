"""A few hundred random bodies against the whole API over a scripted router: a refusal is the worst that happens."""

import asyncio
import logging

import pytest
from api_site import Serve

from disagg.serve.api.preparers import Preparers
from disagg.serve.api.served_model import ServedModel
from random_bodies import BodyMaker

NUM_BODIES = 300


@pytest.mark.parametrize("seed", [1])
async def test_no_body_does_worse_than_a_refusal(
    serve: Serve, served_model: ServedModel, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    maker = BodyMaker(seed, served_model.vocab_size)
    with Preparers(served_model) as preparers, caplog.at_level(logging.ERROR):
        site = await serve(preparers=preparers)
        lanes = asyncio.Semaphore(4)

        async def send(path: str, body: bytes) -> None:
            async with lanes:
                response = await site.http.post(path, content=body, timeout=60)
            assert response.status_code in (200, 400, 404, 429, 503), (path, body[:500], response.text)
            assert "internal error" not in response.text, (path, body[:500])

        await asyncio.gather(*(send(*maker.make()) for _ in range(NUM_BODIES)))
    assert not caplog.records
