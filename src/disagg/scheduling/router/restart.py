"""When a dead instance is started again, and when it is given up."""

from dataclasses import dataclass

import msgspec


class RestartSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How patient restarts are. A life shorter than ``quick_death_s``, counted from ready, is a quick death."""

    max_quick_deaths: int = 5
    quick_death_s: float = 30.0
    first_delay_s: float = 0.5
    max_delay_s: float = 8.0


@dataclass(slots=True)
class RestartPolicy:
    """The deaths of one instance: the first restarts it at once, repeated quick ones wait twice as long each time.

    A life that never became ready is a quick death. After ``max_quick_deaths`` in a row the instance is given up.
    """

    settings: RestartSettings
    num_quick_deaths: int = 0

    def delay_s(self, ready_for_s: float | None) -> float | None:
        """Note a death after ``ready_for_s`` seconds of service (None: it never was ready).

        Return the seconds until the next start; None gives the instance up.
        """
        if ready_for_s is not None and ready_for_s >= self.settings.quick_death_s:
            self.num_quick_deaths = 0
            return 0.0
        self.num_quick_deaths += 1
        if self.num_quick_deaths >= self.settings.max_quick_deaths:
            return None
        if self.num_quick_deaths == 1:
            return 0.0
        return min(self.settings.max_delay_s, self.settings.first_delay_s * 2.0 ** (self.num_quick_deaths - 2))
