"""CPU time of serving, measured while a server answers clients of the same machine."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from disagg.costs.contention import ServingCost
from disagg.costs.fit import fit_relative
from disagg.costs.measured_steps import MAX_CHUNK, MAX_STEP_S

_LEAST_S = 1e-9
"""What errors are relative to where no time was measured."""


class ServedSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What serving cost while a server streamed ``num_streams`` answers at once, and all its instances computed.

    ``cpu_s`` is the CPU time of API server, router and clients for each decode step, which brings out a token of every
    answer; what the instances computed themselves does not count.
    """

    num_streams: Annotated[int, Meta(ge=1, le=MAX_CHUNK)]
    cpu_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)]


class ServedRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request cost the same processes from arrival to end, ``num_tokens`` answered ones in as many steps."""

    prompt_len: Annotated[int, Meta(ge=1, le=MAX_CHUNK)]
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_CHUNK)]
    cpu_s: Annotated[float, Meta(ge=0, le=MAX_STEP_S)]


def fit_serving(
    samples: Sequence[ServedSample], requests: Sequence[ServedRequest], num_cores: int
) -> ServingCost | None:
    """Return what serving costs: so much a step, a token, a request, and a token of its prompt.

    None where no stream was measured.
    """
    if not samples:
        return None
    step_s, token_s = _fit([sample.num_streams for sample in samples], [sample.cpu_s for sample in samples])
    steps = ServingCost(step_s, token_s, num_cores)
    if not requests:
        return steps
    # Of what a request took, its tokens are accounted for already.
    spent_s = [max(0.0, request.cpu_s - request.num_tokens * steps.work_s(1)) for request in requests]
    request_s, prompt_token_s = _fit([request.prompt_len for request in requests], spent_s)
    return ServingCost(step_s, token_s, num_cores, request_s, prompt_token_s)


def _fit(counts: Sequence[int], spent_s: Sequence[float]) -> tuple[float, float]:
    """Return seconds once, and for each of a count."""
    features = np.array([[1.0, count] for count in counts])
    targets = np.array(spent_s)
    once, each = fit_relative(features, targets, np.maximum(targets, _LEAST_S))
    return float(once), float(each)
