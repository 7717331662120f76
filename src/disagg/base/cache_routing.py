"""What dispatch may make of cached prefixes."""

import enum


class CacheRouting(enum.Enum):
    """What dispatch makes of the prefixes that instances have cached.

    ``BLIND``: nothing. ``AFFINITY``: a request goes where its prefix is, unless the queue there is longer than what it
    saves. ``PULL``: as well, and an instance without the prefix pulls it from one that has it rather than compute it.
    """

    BLIND = "blind"
    AFFINITY = "affinity"
    PULL = "pull"
