"""Identifiers. Each is its own type, so that a block is never passed where a request is meant."""

from typing import NewType

RequestId = NewType("RequestId", str)
"""Internal id of one sequence, made by the API. A client's own id is echoed to it and never used as a key."""

InstanceId = NewType("InstanceId", str)
"""Name of one engine instance, such as ``prefill-0``. A restarted instance keeps its name."""

BlockId = NewType("BlockId", int)
"""Index of one KV block inside one instance's pool."""

BlockHash = NewType("BlockHash", bytes)
"""Digest of a full block's tokens and of all tokens before it, computed at the edge."""

Epoch = NewType("Epoch", int)
"""Attempt number of a request. Messages of an older epoch are refused."""
