"""What forecasts know of all instances together: who knows best what steps cost, how prompts are shared out. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from disagg.base.messages import StepCosts
from disagg.costs.step_costs import PRIOR_COSTS
from disagg.scheduling.dispatch.state import InstanceEntry


@dataclass(frozen=True, slots=True)
class FleetFacts:
    """Costs of steps on the instance that knows best, and the seconds of prefill in a second that all were given."""

    prefill_costs: StepCosts
    decode_costs: StepCosts
    prefill_share: float
    num_idle_cores: int = 0
    """Of instances that lend theirs, those of them that have no work."""
    num_borrowers: int = 0
    """Of the same, those that have."""
    idle_part: float = 1.0
    """Of the time of the same, what prompts have left idle lately."""

    @classmethod
    def of(cls, instances: Iterable[InstanceEntry], now: float) -> "FleetFacts":
        """Look at all instances."""
        instances = tuple(instances)
        lenders = [one for one in instances if one.lends_cores]
        idle = [one for one in lenders if not one.has_work]
        busy_part = sum(one.prefill_work.share(now) for one in lenders) / max(1, len(lenders))
        return cls(
            known_prefill_costs(instances) or PRIOR_COSTS,
            known_decode_costs(instances) or PRIOR_COSTS,
            sum(one.prefill_work.share(now) for one in instances),
            sum(one.limits.num_threads for one in idle),
            len(lenders) - len(idle),
            1 - min(1.0, busy_part),
        )

    def num_borrowed(self, entry: InstanceEntry) -> float:
        """Return on how many cores of neighbours without work a step of an instance is expected to be computed.

        Those of one host lend them; of others there are none that do. Who has work shares them equally. They are lent
        until the neighbour is given a prompt: for the part of the time for which it had none lately.
        """
        if not entry.lends_cores:
            return 0.0
        if entry.has_work:
            now = min(entry.limits.num_borrowable, self.num_idle_cores / max(1, self.num_borrowers))
        else:
            others = max(0, self.num_idle_cores - entry.limits.num_threads)
            now = min(entry.limits.num_borrowable, others / (self.num_borrowers + 1))
        return now * self.idle_part


def known_prefill_costs(instances: Iterable[InstanceEntry]) -> StepCosts | None:
    """Return what prefill costs on the instance that knows best; None where none does."""
    known = [one.lesson for one in instances if one.lesson is not None and one.lesson.num_prefill_steps]
    return max(known, key=lambda one: one.num_prefill_steps).costs if known else None


def known_decode_costs(instances: Iterable[InstanceEntry]) -> StepCosts | None:
    """Return what steps of decodes cost on the instance that knows best; None where none does."""
    known = [one.lesson for one in instances if one.lesson is not None and one.lesson.num_decode_steps]
    return max(known, key=lambda one: one.num_decode_steps).costs if known else None
