"""Which cores each instance computes on, so that instances on one host do not take each other's time."""

from collections import Counter
from collections.abc import Sequence


def assign_cores(cores: Sequence[int], wanted: Sequence[int | None]) -> list[tuple[int, ...]]:
    """Return the cores of each instance, disjoint where there are enough of them.

    ``wanted`` is the number of cores of each instance; None takes an equal part of what the others leave, earlier
    instances first when it does not come out even. With too few cores, instances take turns around them, one each
    (or as many as they want): slower, but no instance is left without.
    """
    free = len(cores) - sum(number or 0 for number in wanted)
    open_ended = sum(number is None for number in wanted)
    if free < open_ended:
        return _share(cores, wanted)
    assigned = []
    start = 0
    for number in wanted:
        if number is None:
            number = -(-free // open_ended)
            free, open_ended = free - number, open_ended - 1
        assigned.append(tuple(cores[start : start + number]))
        start += number
    return assigned


def _share(cores: Sequence[int], wanted: Sequence[int | None]) -> list[tuple[int, ...]]:
    assigned = []
    start = 0
    for number in wanted:
        number = min(number or 1, len(cores))
        assigned.append(tuple(sorted(cores[(start + step) % len(cores)] for step in range(number))))
        start += number
    return assigned


def are_lent(asked: bool | None, placed: bool | None, wanted: Sequence[int | None]) -> bool:
    """Return whether instances of one host lend each other their cores.

    As ``asked`` by a flag, or else as the placement says; where neither does, unless threads are ``wanted`` for some.
    """
    said = placed if asked is None else asked
    return not any(wanted) if said is None else said


def cores_to_borrow(cores: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return, for each instance by its cores, those of others that it may borrow while they have no step.

    As many as it has itself at most: of the instances after it, in turn. None where two instances share a core, as then
    nobody can say whose it is.
    """
    everyone = [core for own in cores for core in own]
    if len(set(everyone)) < len(everyone):
        return [()] * len(cores)
    found = []
    for index, own in enumerate(cores):
        others = [core for other in (*cores[index + 1 :], *cores[:index]) for core in other]
        found.append(tuple(others[: len(own)]))
    return found


def least_taken_cores(cores: Sequence[int], taken: Sequence[int], number: int) -> tuple[int, ...]:
    """Return so many cores for one more instance: those that fewest others have, earlier ones first.

    ``taken`` names a core once for each instance that has it.
    """
    times = Counter(taken)
    order = sorted(cores, key=lambda core: (times[core], cores.index(core)))
    return tuple(sorted(order[:number]))
