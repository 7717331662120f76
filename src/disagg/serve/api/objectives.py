"""Latency objectives of one request: headers, and body fields of the same names with underscores."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta
from starlette.datastructures import Headers
from starlette.types import Scope

from disagg.base.errors import InvalidRequestError
from disagg.base.objectives import Objectives
from disagg.serve.api.schema import MAX_OBJECTIVE_MS

TTFT_HEADER: Final = "x-slo-ttft-ms"
TPOT_HEADER: Final = "x-slo-tpot-ms"

_Milliseconds = Annotated[float, Meta(gt=0, le=MAX_OBJECTIVE_MS)]


def objectives_of_ms(ttft_ms: float | None, tpot_ms: float | None) -> Objectives:
    """Return what is given in milliseconds."""
    return Objectives(
        ttft_s=None if ttft_ms is None else ttft_ms / 1e3, tpot_s=None if tpot_ms is None else tpot_ms / 1e3
    )


def objectives_of_headers(scope: Scope) -> Objectives:
    """Return what the headers say. Raises InvalidRequestError for what is no duration."""
    headers = Headers(scope=scope)
    return objectives_of_ms(_milliseconds(headers, TTFT_HEADER), _milliseconds(headers, TPOT_HEADER))


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
