"""Terms of one request: objectives, priority, class of service and tenant, from its headers, its body and its key.

What the body says counts before what the headers say, both before the class, and the class before ``--slo``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.datastructures import Headers
from starlette.types import Scope

from disagg.base.errors import InvalidRequestError
from disagg.base.known_names import known_names
from disagg.base.objectives import Objectives
from disagg.base.service_classes import ServiceClass
from disagg.base.tenants import TenantSettings
from disagg.serve.api.schema import MAX_OBJECTIVE_MS, MAX_TENANT_CHARACTERS, ChatCompletionRequest, CompletionRequest

TTFT_HEADER: Final = "x-slo-ttft-ms"
TPOT_HEADER: Final = "x-slo-tpot-ms"
CLASS_HEADER: Final = "x-slo-class"

_Milliseconds = Annotated[float, Meta(gt=0, le=MAX_OBJECTIVE_MS)]
_NO_CLASS: Final = ServiceClass()


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of a request without its body: what its headers want, and whose key it has ("" for nobody's)."""

    objectives: Objectives
    service_class: str | None
    tenant: str


@dataclass(frozen=True, slots=True)
class RequestTerms:
    """What a request has. ``service_class`` "": none. Objectives that are missing are as the server says."""

    objectives: Objectives
    priority: int
    service_class: str
    tenant: str


@dataclass(frozen=True, slots=True)
class ServiceTerms:
    """What requests have that say nothing else: by class, by tenant, and all of them."""

    classes: Mapping[str, ServiceClass] = field(default_factory=dict)
    tenants: Mapping[str, TenantSettings] = field(default_factory=dict)
    objectives: Objectives = field(default_factory=Objectives)

    def of(self, request: CompletionRequest | ChatCompletionRequest, caller: Caller) -> RequestTerms:
        """Return the terms of a request. Raises InvalidRequestError when it names a class that is none."""
        # A key says more than what a body calls itself.
        tenant = caller.tenant or (request.user or "")[:MAX_TENANT_CHARACTERS]
        name = request.service_class or caller.service_class or self._class_of_tenant(tenant)
        chosen = self._class(name)
        own = objectives_of_ms(request.x_slo_ttft_ms, request.x_slo_tpot_ms).or_else(caller.objectives)
        return RequestTerms(
            objectives=own.or_else(chosen.objectives),
            priority=chosen.priority if request.priority is None else request.priority,
            service_class=name,
            tenant=tenant,
        )

    def _class_of_tenant(self, tenant: str) -> str:
        settings = self.tenants.get(tenant)
        return "" if settings is None else settings.service_class or ""

    def _class(self, name: str) -> ServiceClass:
        chosen = self.classes.get(name) if name else _NO_CLASS
        if chosen is None:
            raise InvalidRequestError(
                f"no class of service is called {name[:64]!r}: {known_names(name[:64], self.classes)}", "service_class"
            )
        return chosen


NO_TERMS: Final = ServiceTerms()
"""Of a server without classes, tenants and objectives."""


def objectives_of_ms(ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
    """Return what is given in milliseconds."""
    return Objectives(
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3, tpot_s=None if tpot_ms is None else tpot_ms / 1e3
    )


def caller_of(scope: Scope) -> Caller:
    """Return who asks, by headers and key. Raises InvalidRequestError for what is no duration."""
    headers = Headers(scope=scope)
    return Caller(
        objectives=objectives_of_ms(_milliseconds(headers, TTFT_HEADER), _milliseconds(headers, TPOT_HEADER)),
        service_class=headers.get(CLASS_HEADER),
        tenant=scope["state"].get("tenant", ""),
    )


def _milliseconds(headers: Headers, name: str) -> float | None:
    text = headers.get(name)
    if text is None:
        return None
    try:
        return msgspec.convert(text, _Milliseconds, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(
            f"the header {name} is {text[:64]!r}: give milliseconds above 0, up to a day", param=name
        ) from error
