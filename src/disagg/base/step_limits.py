"""What bounds the steps of an instance, as it tells the router."""

import msgspec

from disagg.base.message_fields import Count, Positive


class StepLimits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What bounds the steps of an instance. ``sized_by_slack``: prefill is sized by when answers' tokens are due.

    ``num_threads`` compute them, and ``num_borrowable`` cores of others on its host while those have no step.
    """

    max_batch_tokens: Positive = 512
    max_batch_size: Positive = 64
    sized_by_slack: bool = False
    num_threads: Positive = 1
    num_borrowable: Count = 0
