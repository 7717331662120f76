"""What an instance is told, and tells, where a server has several routers: see the architecture."""

from typing import Final

import msgspec

from disagg.base.ids import RouterId
from disagg.base.message_fields import Count, Message, Name

SAME_HOST: Final = "tcp://*:"
"""How the endpoint of a router begins that is where the first router is, whatever address that was reached at."""


class JoinRouter(Message, frozen=True, kw_only=True):
    """Take sequences of one more router, too, which listens at ``endpoint``: tell it that you are ready.

    ``endpoint`` is in ZeroMQ's words, or ``SAME_HOST`` and a port.
    """

    router: RouterId
    endpoint: Name


class LeaveRouter(Message, frozen=True, kw_only=True):
    """That life of a router is over: forget its sequences."""

    router: RouterId


class ForeignLoad(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What other routers have given to an instance, as dispatch counts it: see ``InstanceEntry``."""

    num_sequences: Count = 0
    num_prefills: Count = 0
    """Sequences that wait for their first token from there, the tokens that are still to be computed until then, and
    the squares of those numbers in sum."""
    prefill_tokens: Count = 0
    prefill_squares: Count = 0
    num_decodes: Count = 0
    kv_tokens: Count = 0
    """Tokens of the sequences that are decoded there, or leased to others."""
