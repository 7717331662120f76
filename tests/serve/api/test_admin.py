"""``/admin``: commands over HTTP, and who may give them."""

import httpx
import pytest
from api_site import Serve
from scripted_router import ScriptedRouter
from starlette.applications import Starlette

from disagg.base.errors import AuthenticationError, ConfigurationError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.serve.api.admin import Administration


class ScriptedOperator:
    """Says what it was told; refuses to do anything to ``prefill-0``."""

    async def drain(self, instance: InstanceId, *, force: bool) -> str:
        if instance == "prefill-0":
            raise ConfigurationError("without prefill-0, no request could be served")
        return f"drain {instance} {force}"

    async def undrain(self, instance: InstanceId) -> str:
        return f"undrain {instance}"

    async def remove(self, instance: InstanceId, *, force: bool) -> str:
        return f"remove {instance} {force}"

    async def flip(self, instance: InstanceId, role: Role, *, force: bool) -> str:
        return f"flip {instance} {role.value} {force}"

    async def add(self, role: Role) -> tuple[InstanceId, str]:
        return InstanceId(f"{role.value}-1"), "add"


@pytest.mark.parametrize(
    ("path", "body", "instance", "message"),
    [
        ("/decode-0/drain", {}, "decode-0", "drain decode-0 False"),
        ("/decode-0/drain", {"force": True}, "decode-0", "drain decode-0 True"),
        ("/decode-0/drain", {"undo": True}, "decode-0", "undrain decode-0"),
        ("/decode-0/remove", {}, "decode-0", "remove decode-0 False"),
        ("/decode-0/flip", {"role": "prefill"}, "decode-0", "flip decode-0 prefill False"),
        ("", {"role": "decode"}, "decode-1", "add"),
    ],
)
async def test_a_command_is_begun_and_said(
    serve: Serve, path: str, body: dict[str, object], instance: str, message: str
) -> None:
    site = await serve(operator=ScriptedOperator())
    answer = await site.http.post(f"/admin/instances{path}", json=body)
    assert answer.status_code == 202
    assert answer.json() == {"instance": instance, "message": message}


async def test_the_instances_are_listed(serve: Serve) -> None:
    site = await serve(operator=ScriptedOperator())
    listed = (await site.http.get("/admin/instances")).json()["instances"]
    assert [(one["instance"], one["state"], one["num_sequences"]) for one in listed] == [
        ("prefill-0", "ready", 0),
        ("decode-0", "ready", 0),
    ]


async def test_what_cannot_be_done_now_is_a_conflict_and_what_is_malformed_a_bad_request(serve: Serve) -> None:
    site = await serve(operator=ScriptedOperator())
    refused = await site.http.post("/admin/instances/prefill-0/drain")
    assert refused.status_code == 409
    assert refused.json()["error"]["message"] == "without prefill-0, no request could be served"
    for path, body in (("/decode-0/flip", {"role": "cook"}), ("/decode-0/drain", {"soon": 1}), ("", {}), ("", [])):
        answer = await site.http.post(f"/admin/instances{path}", json=body)
        assert answer.status_code == 400
        assert "/admin/instances" in answer.json()["error"]["message"]


async def test_a_key_is_asked_for_where_there_is_one(serve: Serve) -> None:
    site = await serve(operator=ScriptedOperator(), api_key="secret")
    assert (await site.http.post("/admin/instances/decode-0/drain")).status_code == 202
    stranger = await site.http.post("/admin/instances/decode-0/drain", headers={"Authorization": "Bearer guess"})
    assert stranger.status_code == 401


async def test_no_web_page_gives_commands_without_a_key(serve: Serve) -> None:
    site = await serve(operator=ScriptedOperator())
    answer = await site.http.post("/admin/instances/decode-0/drain", headers={"Origin": "http://evil.example"})
    assert answer.status_code == 401
    assert "start it with --api-key" in answer.json()["error"]["message"]


async def test_another_machine_gives_no_commands_without_a_key() -> None:
    administration = Administration(ScriptedRouter(lambda _: []), ScriptedOperator(), has_key=False)
    for host, status in (("127.0.0.1", 200), ("::1", 200), ("10.0.0.7", 401), ("", 401)):
        transport = httpx.ASGITransport(Starlette(routes=administration.routes()), client=(host, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            if status == 200:
                assert (await http.get("/admin/instances")).status_code == 200
            else:
                with pytest.raises(AuthenticationError, match="own machine alone"):
                    await http.get("/admin/instances")
