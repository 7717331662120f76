"""What one of several routers tells the others of those who share the server: as data."""

import msgspec

from disagg.base.message_fields import Count, Words


class TenantShare(msgspec.Struct, frozen=True, array_like=True):
    """A tenant at one router."""

    tenant: Words
    num_under_way: Count
    """Sequences that wait or are served."""
    num_served: Count
    """Tokens since the router told last, an output token counting as two."""
