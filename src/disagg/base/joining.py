"""How an instance on another host becomes part of a running deployment: what its host and the router say.

The host asks first, before it loads anything, and is admitted under a name or refused in words. From then on its
instance speaks the control plane's own messages under that name, and the host says that it is still there.
"""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from disagg.base.block_sizes import why_not_made
from disagg.base.config import DType, Quantization
from disagg.base.ids import InstanceId
from disagg.base.message_fields import Message, Name, Words
from disagg.base.messages import decode_message
from disagg.base.objectives import Objectives
from disagg.base.request import Role

HOST_PREFIX: Final = "host."
"""What the names of hosts on the control socket begin with; no instance's does."""
PING_S: Final = 2.0
"""How often a host says that it is there, and is answered."""
LOST_S: Final = 15.0
"""Without an answer for so long, a host ends its instance and asks anew."""


class ModelIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What two instances must agree on so that one can go on with the other's KV blocks."""

    fingerprint: Annotated[str, Meta(max_length=64)]
    """Of configuration and weights."""
    dtype: DType
    quantization: Quantization | None
    block_size: int

    def why_not(self, other: "ModelIdentity") -> str:
        """Return why an instance of ``other`` cannot work with ones of this; an empty string where it can."""
        for name, what in (
            ("fingerprint", "model or other weights"),
            ("dtype", "--dtype"),
            ("quantization", "--quantization"),
        ):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                return f"another {what}: the server has {_words(ours)}, this host {_words(theirs)}"
        why = why_not_made(self.block_size, other.block_size)
        return f"another --block-size: the server has {why}" if why else ""


class ServerTerms(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the server decides for all its instances, wherever they are."""

    tells_costs: bool = False
    """See SchedulerSettings."""
    tells_tokens: bool = False
    """See InstanceSettings."""
    objectives: Objectives = Objectives()
    """Of requests that bring none."""


class AskToJoin(Message, frozen=True, kw_only=True):
    """A host offers an instance."""

    version: int
    release: Name
    role: Role
    model: ModelIdentity
    host: Name
    """In words, for people."""
    name: Name | None = None
    """What the instance would be called; another name is given where that is taken."""


class StillHere(Message, frozen=True, kw_only=True):
    """Either side: a sign of life."""

    takes_requests: bool = False
    """The router's: so does the host's instance."""


class AskToLeave(Message, frozen=True, kw_only=True):
    """The host is to stop: its instance gives away what it holds, and is told to end once it holds nothing."""


class InstanceEnded(Message, frozen=True, kw_only=True):
    """The host's instance has ended."""

    detail: Words
    returns: bool = False
    """It is started again, and is to keep its name; else it gives that up."""


class Admitted(Message, frozen=True, kw_only=True):
    """The host is to start an instance of this name."""

    instance: InstanceId
    terms: ServerTerms


class NotAdmitted(Message, frozen=True, kw_only=True):
    """The host's instance would not fit."""

    why: Words


class EndYourInstance(Message, frozen=True, kw_only=True):
    """The router does not know, or no longer wants, the host's instance."""

    why: Words
    for_good: bool = False
    """It was removed: the host is not to ask anew."""


FromHost = AskToJoin | AskToLeave | StillHere | InstanceEnded
ToHost = Admitted | NotAdmitted | EndYourInstance | StillHere

_from_host: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)


def decode_from_host(data: bytes) -> FromHost:
    """Decode what a host sent; raise ProtocolError on anything else."""
    return decode_message(data, _from_host, "message of a host")


def decode_for_host(data: bytes) -> ToHost:
    """Decode what the router sent to a host; raise ProtocolError on anything else."""
    return decode_message(data, _to_host, "message to a host")


def _words(value: object) -> str:
    if isinstance(value, DType | Quantization):
        return str(value.value)
    return "none" if value is None else str(value)
