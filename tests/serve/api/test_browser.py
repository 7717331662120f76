"""Pages in a browser that call the API from another origin."""

import pytest
from api_site import Serve

from disagg.base.config import ServeSettings
from disagg.base.errors import ConfigurationError

ORIGIN = "http://localhost:3000"
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("origins", [(ORIGIN,), ("https://a.example", ORIGIN), ("*",)])
async def test_a_listed_origin_may_ask_and_read(serve: Serve, origins: tuple[str, ...]) -> None:
    site = await serve(api_key="secret", settings=ServeSettings(cors_origin=origins))
    del site.http.headers["Authorization"]
    allowed = await site.http.options("/v1/completions", headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] in (ORIGIN, "*")
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    refused = await site.http.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": ORIGIN})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] in (ORIGIN, "*")
    headers = {"Origin": ORIGIN, "Authorization": "Bearer secret"}
    answer = await site.http.post("/v1/completions", json={"prompt": "x", "stream": True}, headers=headers)
    assert answer.text.endswith("data: [DONE]\n\n")
    assert "X-Request-Id" in answer.headers["access-control-expose-headers"]


async def test_other_origins_may_not(serve: Serve) -> None:
    site = await serve(settings=ServeSettings(cors_origin=(ORIGIN,)))
    refused = await site.http.options("/v1/completions", headers={**PREFLIGHT, "Origin": "https://evil.example"})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers


async def test_without_the_flag_nobody_is_told_anything(serve: Serve) -> None:
    site = await serve()
    answer = await site.http.get("/health", headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://a,http://b", ""])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(ConfigurationError, match="--cors-origin"):
        ServeSettings(cors_origin=(origin,))


@pytest.mark.parametrize("key", ["", " ", "a\n", " a", "\x00"])
def test_a_key_that_nobody_can_send_is_refused(key: str) -> None:
    with pytest.raises(ConfigurationError, match="--api-key"):
        ServeSettings(api_key=key)
