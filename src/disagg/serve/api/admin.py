"""``/admin``: an operator looks at the instances, and adds, drains, removes or flips one while requests go on."""

import ipaddress
from collections.abc import Collection
from typing import Protocol, TypeVar

import msgspec
from starlette.datastructures import Address
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from disagg.base.errors import AuthenticationError, InvalidRequestError
from disagg.base.ids import InstanceId
from disagg.base.request import Role
from disagg.serve.api.http import read_body
from disagg.serve.api.responses import json_response
from disagg.serve.api.status import audit_view, instance_view, link_view, plan_words
from disagg.serve.api.views import CommandReply, InstanceList, LinkList
from disagg.serve.router.interface import Router

_ACCEPTED = 202

Body = TypeVar("Body")


class Operator(Protocol):
    """Who carries out commands. Each returns, with words, once what it asks for has begun.

    Raises ConfigurationError, with the reason, when a command cannot be carried out as things are. With ``force``, one
    after which no request can be served is carried out all the same.
    """

    async def drain(self, instance: InstanceId, *, force: bool) -> str:
        """Give an instance nothing new, and its running answers to others."""

    async def undrain(self, instance: InstanceId) -> str:
        """Give a draining instance requests again."""

    async def remove(self, instance: InstanceId, *, force: bool) -> str:
        """Drain an instance, then end it."""

    async def flip(self, instance: InstanceId, role: Role, *, force: bool) -> str:
        """Give an instance another role."""

    async def add(self, role: Role) -> tuple[InstanceId, str]:
        """Start one more instance; its name comes first."""

    async def measure_links(self) -> None:
        """Let the links over which KV blocks are handed over be measured anew."""

    async def restart(self) -> str:
        """Start the routers anew, one after the other, while the instances live on."""


class AddBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/instances``."""

    role: Role


class DrainBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/instances/NAME/drain``. ``undo`` ends it."""

    undo: bool = False
    force: bool = False


class RemoveBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/instances/NAME/remove``."""

    force: bool = False


class FlipBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /admin/instances/NAME/flip``."""

    role: Role
    force: bool = False


class Administration:
    """Handlers of commands. Without ``has_key`` they answer this machine's own programs alone, and no web page.

    ``tenants`` have keys that give no commands.
    """

    def __init__(
        self, router: Router, operator: Operator, *, has_key: bool, tenants: Collection[str] = frozenset()
    ) -> None:
        self._tenants = tenants
        self._router = router
        self._operator = operator
        self._has_key = has_key

    def routes(self) -> list[Route]:
        """Return what the application is to serve."""
        one = "/admin/instances/{name}"
        return [
            Route("/admin/instances", self.instances),
            Route("/admin/instances", self.add, methods=["POST"]),
            Route("/admin/links", self.links),
            Route("/debug/audit", self.audit),
            Route("/admin/links", self.measure_links, methods=["POST"]),
            Route("/admin/restart", self.restart, methods=["POST"]),
            Route(f"{one}/drain", self.drain, methods=["POST"]),
            Route(f"{one}/remove", self.remove, methods=["POST"]),
            Route(f"{one}/flip", self.flip, methods=["POST"]),
        ]

    async def instances(self, request: Request) -> Response:
        """List the instances."""
        self._check_caller(request)
        elastic = self._router.elastic_view()
        return json_response(
            InstanceList(
                instances=[instance_view(status) for status in self._router.instances()],
                scaling=list(elastic.scaling),
                plan=plan_words(elastic),
            )
        )

    async def audit(self, request: Request) -> Response:
        """Return the sum of every instance's KV blocks at this instant."""
        self._check_caller(request)
        return json_response(audit_view(*await self._router.audit()))

    async def links(self, request: Request) -> Response:
        """List the links over which KV blocks are handed over."""
        self._check_caller(request)
        return json_response(self._links())

    async def measure_links(self, request: Request) -> Response:
        """Let them be measured anew; they are listed as not measured until they are."""
        self._check_caller(request)
        await self._operator.measure_links()
        return json_response(self._links(), _ACCEPTED)

    async def restart(self, request: Request) -> Response:
        """Start the routers anew."""
        self._check_caller(request)
        return json_response(CommandReply(instance=InstanceId(""), message=await self._operator.restart()), _ACCEPTED)

    def _links(self) -> LinkList:
        return LinkList(links=[link_view(link) for link in self._router.links()])

    async def add(self, request: Request) -> Response:
        """Start one more."""
        body = await self._body(request, AddBody)
        return _accepted(*await self._operator.add(body.role))

    async def drain(self, request: Request) -> Response:
        """Drain one, or end that."""
        body, name = await self._body(request, DrainBody), _name(request)
        operator = self._operator
        words = await (operator.undrain(name) if body.undo else operator.drain(name, force=body.force))
        return _accepted(name, words)

    async def remove(self, request: Request) -> Response:
        """Remove one."""
        body, name = await self._body(request, RemoveBody), _name(request)
        return _accepted(name, await self._operator.remove(name, force=body.force))

    async def flip(self, request: Request) -> Response:
        """Give one another role."""
        body, name = await self._body(request, FlipBody), _name(request)
        return _accepted(name, await self._operator.flip(name, body.role, force=body.force))

    async def _body(self, request: Request, kind: type[Body]) -> Body:
        """Return what the caller wants; raise InvalidRequestError when it is malformed."""
        self._check_caller(request)
        try:
            return msgspec.json.decode(await read_body(request.receive) or b"{}", type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequestError(f"the body is not what {request.url.path} takes: {error}") from error

    def _check_caller(self, request: Request) -> None:
        """Raise AuthenticationError for a caller who could not be asked for a key and may not go without one."""
        if self._has_key:
            if request.scope.get("state", {}).get("tenant") in self._tenants:
                raise AuthenticationError("a tenant's key gives no commands: send one of the server's own (--api-key)")
            return
        if not _is_local(request.client) or "origin" in request.headers:
            raise AuthenticationError(
                "without a key, /admin answers programs on the server's own machine alone: start it with --api-key, "
                "and send the header 'Authorization: Bearer KEY'"
            )


def _name(request: Request) -> InstanceId:
    return InstanceId(str(request.path_params["name"]))


def _accepted(name: InstanceId, words: str) -> Response:
    return json_response(CommandReply(instance=name, message=words), _ACCEPTED)


def _is_local(client: Address | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client.host).is_loopback
    except ValueError:
        return False
