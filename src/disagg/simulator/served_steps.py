"""CPU time of serving, measured while a server streams tokens to clients of the same machine."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from disagg.simulator.contention import ServingCost
from disagg.simulator.fit import fit_relative


class ServedSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What serving cost while a server streamed ``num_streams`` answers at once, and all its instances computed.

    ``cpu_s`` is the CPU time of API server, router and clients for each decode step, which brings out a token of every
    answer; what the instances computed themselves does not count. ``step_s`` is what such a step took.
    """

    num_streams: Annotated[int, Meta(ge=1)]
    step_s: Annotated[float, Meta(gt=0)]
    cpu_s: Annotated[float, Meta(ge=0)]


def fit_serving(samples: Sequence[ServedSample], num_cores: int, cores_per_instance: int) -> ServingCost | None:
    """Return what serving costs, so much a step and so much a token.

    None where two computing instances leave a core free, as serving then costs them nothing, or where nothing was
    measured.
    """
    felt = ServingCost(0.0, 0.0, num_cores, cores_per_instance)
    if not samples or not felt.is_felt(2):
        return None
    features = np.array([[1.0, sample.num_streams] for sample in samples])
    spent_s = np.array([sample.cpu_s for sample in samples])
    step_s, token_s = fit_relative(features, spent_s, np.maximum(spent_s, 1e-9))
    return ServingCost(float(step_s), float(token_s), num_cores, cores_per_instance)
