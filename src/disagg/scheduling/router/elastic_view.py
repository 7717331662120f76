"""What is known of how a deployment changes by itself: for people, metrics, and routers that follow."""

import msgspec

from disagg.scheduling.router.outputs import PlanDecided
from disagg.scheduling.router.scaling import ScalingView


class PlanCounts(msgspec.Struct, frozen=True):
    """How often the placement was planned anew, by what was made of it."""

    num_changed: int = 0
    num_advised: int = 0
    num_stayed: int = 0

    def plus(self, decided: PlanDecided) -> "PlanCounts":
        """Return the counts with one more."""
        advised = decided.pays and not decided.acts
        return PlanCounts(
            self.num_changed + decided.acts, self.num_advised + advised, self.num_stayed + (not decided.pays)
        )


class ElasticView(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The roles that are scaled, as they were seen last, and what was decided last of the placement."""

    scaling: tuple[ScalingView, ...] = ()
    plan: PlanDecided | None = None
    plans: PlanCounts = PlanCounts()
