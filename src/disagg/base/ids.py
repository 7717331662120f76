"""Identifiers. Each is its own type, so that a block is never passed where a request is meant."""

from typing import Final, NewType

RequestId = NewType("RequestId", str)
"""Internal id of one sequence, made by the API. A client's own id is echoed to it and never used as a key."""

InstanceId = NewType("InstanceId", str)
"""Name of one engine instance, such as ``prefill-0``. A restarted instance keeps its name."""

RouterId = NewType("RouterId", str)
"""One life of one of a server's routers, such as ``0.1``; empty for that of a server that has no other."""

BlockId = NewType("BlockId", int)
"""Index of one KV block inside one instance's pool."""

BlockHash = NewType("BlockHash", bytes)
"""Digest of a full block's tokens and of all tokens before it, computed at the edge."""

Epoch = NewType("Epoch", int)
"""Attempt number of a request. Messages of an older epoch are refused."""

_OWNER_MARK: Final = "/"


def owned_by(router: RouterId, name: str) -> RequestId:
    """Return the id of a sequence of this router: unlike that of any other router's."""
    return RequestId(f"{router}{_OWNER_MARK}{name}" if router else name)


def owner_of(request_id: RequestId) -> RouterId:
    """Return whose a sequence is."""
    router, mark, _ = request_id.partition(_OWNER_MARK)
    return RouterId(router if mark else "")
