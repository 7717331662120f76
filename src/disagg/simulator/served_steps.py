"""Steps measured while a server streams their tokens to clients of the same machine, and what serving costs."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from disagg.simulator.contention import Activity, Interference, ServingCost
from disagg.simulator.fit import fit_relative
from disagg.simulator.latency import LatencyModel
from disagg.simulator.measured_steps import Chunks, shape_of


class ServedSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The mean step of an instance of a server, while its one neighbour computed without pause.

    ``chunks`` are the step's, as (tokens already there, new tokens); each of them brings out a token. The steps of the
    neighbour took ``neighbour_step_s`` and brought out ``neighbour_tokens`` each.
    """

    chunks: Chunks
    time_s: Annotated[float, Meta(gt=0)]
    neighbour: Activity
    neighbour_tokens: Annotated[int, Meta(ge=0)]
    neighbour_step_s: Annotated[float, Meta(gt=0)]


def fit_serving(
    samples: Sequence[ServedSample],
    alone: LatencyModel,
    interference: Interference,
    num_cores: int,
    cores_per_instance: int,
) -> ServingCost | None:
    """Return what serving costs beyond the step times of an instance ``alone`` and the ``interference`` of two.

    None where two computing instances leave a core free, as serving then costs them nothing, or where nothing was
    measured. Two instances share the work: half of what an own step makes, and half of what the neighbour's steps make
    while it lasts.
    """
    felt = ServingCost(0.0, 0.0, num_cores, cores_per_instance)
    if not samples or not felt.is_felt(2):
        return None
    features, added, wholes = [], [], []
    for sample in samples:
        shape = shape_of(sample.chunks)
        steps_beside = sample.time_s / sample.neighbour_step_s if sample.neighbour_tokens else 0.0
        num_tokens = shape.num_samples + steps_beside * sample.neighbour_tokens
        features.append([(1 + steps_beside) / 2, num_tokens / 2])
        expected_s = sum(alone.stage_times_s(shape)) + interference.added_s(sample.neighbour, shape)
        added.append(sample.time_s - expected_s)
        wholes.append(sample.time_s)
    step_s, token_s = fit_relative(np.array(features), np.array(added), np.array(wholes))
    return ServingCost(float(step_s), float(token_s), num_cores, cores_per_instance)
