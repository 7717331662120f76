"""A way through the deployment, and what it is predicted to bring."""

import msgspec

from disagg.base.ids import InstanceId


class Path(msgspec.Struct, frozen=True, array_like=True):
    """The instance that brings the first token, and the one that brings the others."""

    prefill: InstanceId
    decode: InstanceId

    @property
    def hands_over(self) -> bool:
        """True when KV blocks travel."""
        return self.prefill != self.decode


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """What a path is predicted to bring from now on. ``follows_roles``: strict roles allow it."""

    path: Path
    follows_roles: bool
    ttft_s: float
    tpot_s: float
    hand_over_s: float = 0.0
    others_tpot_s: float = 0.0
    """Of those who decode there already; 0 without any."""
    num_harmed: int = 0
    """Of those, who keep their objective now and would not any more."""
