"""Requests that name a class of service: what they get, what counts before it, and what is counted of it."""

from typing import Any

import pytest
from api_site import Serve, Site

from disagg.base.errors import OverloadedError
from disagg.base.objectives import Objectives
from disagg.base.service_classes import ServiceClass
from disagg.base.tenants import TenantSettings
from disagg.serve.api.terms import ServiceTerms

LOOSE = Objectives(ttft_s=3600.0, tpot_s=3600.0)
TERMS = ServiceTerms(
    classes={
        "interactive": ServiceClass(objectives=Objectives(ttft_s=0.5, tpot_s=0.05), priority=-10),
        "batch": ServiceClass(objectives=LOOSE, priority=10),
        "hopeless": ServiceClass(objectives=Objectives(ttft_s=1e-9)),
    },
    tenants={"nightly": TenantSettings(service_class="batch")},
    objectives=Objectives(tpot_s=0.2),
)
PROMPT = {"prompt": "x", "max_tokens": 3}


async def terms_of(site: Site, body: dict[str, Any], headers: dict[str, str]) -> tuple[Any, ...]:
    response = await site.http.post("/v1/completions", json=PROMPT | body, headers=headers)
    assert response.status_code == 200, response.text
    request = site.router.requests[-1]
    return request.service_class, request.priority, request.objectives.ttft_s, request.objectives.tpot_s


@pytest.mark.parametrize(
    ("body", "headers", "expected"),
    [
        ({}, {}, ("", 0, None, None)),
        ({"service_class": "interactive"}, {}, ("interactive", -10, 0.5, 0.05)),
        ({}, {"x-slo-class": "interactive"}, ("interactive", -10, 0.5, 0.05)),
        ({"service_class": "batch"}, {"x-slo-class": "interactive"}, ("batch", 10, 3600.0, 3600.0)),
        ({"service_class": "interactive", "x_slo_ttft_ms": 900}, {}, ("interactive", -10, 0.9, 0.05)),
        ({"service_class": "interactive"}, {"x-slo-tpot-ms": "70"}, ("interactive", -10, 0.5, 0.07)),
        ({"service_class": "interactive", "priority": 0}, {}, ("interactive", 0, 0.5, 0.05)),
        ({"user": "nightly"}, {}, ("batch", 10, 3600.0, 3600.0)),
        ({"user": "nightly"}, {"x-slo-class": "interactive"}, ("interactive", -10, 0.5, 0.05)),
        ({"user": "other"}, {}, ("", 0, None, None)),
        ({"service_tier": "auto"}, {}, ("", 0, None, None)),
    ],
)
async def test_what_a_request_says_counts_before_its_class(
    serve: Serve, body: dict[str, Any], headers: dict[str, str], expected: tuple[Any, ...]
) -> None:
    site = await serve(terms=TERMS)
    assert await terms_of(site, body, headers) == expected


async def test_a_key_says_of_which_tenant_the_class_is(serve: Serve) -> None:
    site = await serve(terms=TERMS, tenant_keys={"sk-nightly": "nightly", "sk-search": "search"})
    nightly, search = ({"Authorization": f"Bearer sk-{name}"} for name in ("nightly", "search"))
    assert await terms_of(site, {"user": "search"}, nightly) == ("batch", 10, 3600.0, 3600.0)
    assert site.router.requests[-1].tenant == "nightly"
    assert await terms_of(site, {"user": "nightly"}, search) == ("", 0, None, None)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_a_class_that_is_none_is_refused_with_those_that_there_are(serve: Serve, path: str) -> None:
    site = await serve(terms=TERMS)
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    asked = {"/v1/completions": "prompt", "/v1/chat/completions": "messages", "/v1/responses": "input"}[path]
    for named in ({"json": {asked: body[asked], "service_class": "interactiv"}}, {"json": {asked: body[asked]}}):
        headers = {} if "service_class" in named["json"] else {"x-slo-class": "interactiv"}
        response = await site.http.post(path, headers=headers, **named)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "service_class"
        assert "there are interactive, batch, hopeless; did you mean interactive?" in error["message"]
    assert not site.router.requests


async def test_a_server_without_classes_says_so(serve: Serve) -> None:
    site = await serve()
    response = await site.http.post("/v1/completions", json={**PROMPT, "service_class": "batch"})
    assert response.status_code == 400
    assert "there are none" in response.json()["error"]["message"]


async def test_attainment_is_counted_by_class(serve: Serve) -> None:
    site = await serve(terms=TERMS)
    for name, number in (("batch", 2), ("hopeless", 1)):
        for _ in range(number):
            await terms_of(site, {"service_class": name}, {})
    for name, kept, missed in (("batch", 2, 0), ("hopeless", 0, 1)):
        assert await site.metric("disagg:objectives_total", service_class=name, outcome="kept") == kept
        assert await site.metric("disagg:objectives_total", service_class=name, outcome="missed") == missed


async def test_what_is_refused_misses_its_objectives(serve: Serve) -> None:
    site = await serve(terms=TERMS, refusal=OverloadedError("too much to do", 2.0))
    response = await site.http.post("/v1/completions", json={**PROMPT, "service_class": "batch", "n": 2})
    assert response.status_code == 429
    assert await site.metric("disagg:objectives_total", service_class="batch", outcome="missed") == 2
    assert await site.metric("disagg:objectives_total", service_class="batch", outcome="kept") == 0


async def test_what_has_no_objective_of_its_own_is_held_to_the_servers(serve: Serve) -> None:
    site = await serve(terms=ServiceTerms(objectives=Objectives(ttft_s=1e-9)))
    await terms_of(site, {}, {})
    assert await site.metric("disagg:objectives_total", service_class="", outcome="missed") == 1
