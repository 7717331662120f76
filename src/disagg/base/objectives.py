"""What a request's latency ought to be, as the instances that compute it are told."""

from typing import Annotated

import msgspec
from msgspec import Meta

_LONGEST_S = 86_400
_Limit = Annotated[float, Meta(gt=0, le=_LONGEST_S)]


class Objectives(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Seconds to the first token, and for each token after it. None: no objective."""

    ttft_s: _Limit | None = None
    tpot_s: _Limit | None = None

    def or_else(self, others: "Objectives") -> "Objectives":
        """Return these, and those of ``others`` where one is missing."""
        if self.ttft_s is not None and self.tpot_s is not None:
            return self
        if self.ttft_s is None and self.tpot_s is None:
            return others
        return Objectives(
            ttft_s=others.ttft_s if self.ttft_s is None else self.ttft_s,
            tpot_s=others.tpot_s if self.tpot_s is None else self.tpot_s,
        )


NO_OBJECTIVES = Objectives()
BEST_EFFORT = Objectives(ttft_s=_LONGEST_S, tpot_s=_LONGEST_S)
"""Of a request that is served when others leave time for it."""
