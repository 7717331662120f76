"""What the fields of messages may hold, and what all messages have in common."""

from typing import Annotated, Final

import msgspec
from msgspec import Meta

PROTOCOL_VERSION: Final = 8
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
HEARTBEAT_MS: Final = 2000
HEARTBEAT_TIMEOUT_MS: Final = 10_000
"""Between hosts: a connection over which nothing comes for so long is made anew."""

Count = Annotated[int, Meta(ge=0, lt=2**62)]
Positive = Annotated[int, Meta(ge=1, lt=2**62)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e15)]
"""Of a clock or a duration; bounds exclude NaN and infinity."""
BytesPerSecond = Annotated[float, Meta(ge=0.0, le=1e15)]
Name = Annotated[str, Meta(max_length=256)]
Words = Annotated[str, Meta(max_length=65536)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of all messages: the tag is the class name."""
