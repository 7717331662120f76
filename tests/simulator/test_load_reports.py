"""What the simulated router is told before it compares instances: as good as the loads of all of them at every time."""

import pytest
from simulated import cluster_spec, instance, name_blocks, poisson, serve, stamps

from disagg.base.request import Role
from disagg.scheduling.router.core import RouterCore
from disagg.simulator.request import SimulatedRequest


def requests(named: bool) -> list[SimulatedRequest]:
    found = poisson(rate=120, count=120, seed=3)
    for number, request in enumerate(found if named else ()):
        # Five conversations, of which some requests repeat a part.
        tokens = [number % 5] * request.prompt_len + [number % 5] * request.output_len
        name_blocks(request, tokens)
    return found


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("num_colocated", [0, 2])
def test_loads_of_a_few_instances_decide_as_those_of_all(
    named: bool, num_colocated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = cluster_spec(
        *(instance(Role.PREFILL, number) for number in range(2)),
        *(instance(Role.DECODE, number, num_blocks=number * 100 + 100) for number in range(5)),
        *(instance(Role.COLOCATED, number) for number in range(num_colocated)),
    )
    asked: list[int] = []
    compared = RouterCore.compared

    def count(core: RouterCore, one: object) -> list[object]:
        asked.append(len(found := compared(core, one)))  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(RouterCore, "compared", count)
    few = stamps(serve(spec, requests(named)))
    assert sum(asked) > len(few)
    monkeypatch.setattr(
        RouterCore,
        "compared",
        lambda core, one: [member.entry for member in core.members if member.role is not Role.PREFILL],
    )
    assert stamps(serve(spec, requests(named))) == few
