"""What networks carry in time, and in which form of KV blocks: raw where that is enough, int8 where it is not."""

from pathlib import Path
from typing import Any

import pytest
from planning import EvenPlatform, nodes, problem, topology, workload

from disagg.base.request import Role
from disagg.base.transfer_settings import KvTransferDtype
from disagg.cli.placement_file import read_placement, write_placement
from disagg.costs.links import KvCodec
from disagg.placement.composition import Composition, Family, compose
from disagg.placement.instance_choice import InstanceChoice
from disagg.placement.layout import cluster_of, lay_out, placement_of
from disagg.placement.networks import Networks
from disagg.placement.problem import PlanProblem

BOTH = (KvCodec.RAW, KvCodec.INT8)


def apart(bytes_per_s: float = 1e8, **changes: Any) -> PlanProblem:
    """Two nodes of one device each: what is handed over leaves a node. 20 MB of KV for a prompt."""
    return problem(
        **{
            "topology": topology(nodes(2, 1), bytes_per_s=bytes_per_s),
            "platforms": {"gpu": EvenPlatform(kv_bytes_per_token=20_000)},
            "codecs": BOTH,
            **changes,
        }
    )


def anywhere(one: PlanProblem) -> Composition:
    prefill, decode = InstanceChoice(Role.PREFILL, "gpu"), InstanceChoice(Role.DECODE, "gpu")
    (found,) = [one for one in compose(one, [prefill, decode], lambda choice: 8.0) if one.family is Family.ANYWHERE]
    return found


def test_a_network_is_full_before_its_bandwidth_is() -> None:
    """A transfer takes 0.2 s and an answer of 20 tokens may lose 0.57 s: at 4.5 a second most wait longer."""
    (raw, int8) = Networks(apart()).between("gpu", "gpu")
    (patient, _) = Networks(apart(target="ttft=400ms,tpot=20s")).between("gpu", "gpu")
    assert 1 < raw.port_rate < 0.9 * patient.port_rate
    assert patient.port_rate == pytest.approx(0.9 * 5)
    assert int8.port_rate > 1.5 * raw.port_rate


def test_answers_too_short_for_any_hand_over_leave_nothing() -> None:
    (raw, _) = Networks(apart(workload=workload(1000, 2), target="ttft=400ms,tpot=30ms")).between("gpu", "gpu")
    assert raw.port_rate < 0.01


def test_kv_is_coded_where_the_network_holds_the_placement_back() -> None:
    slow, fast = anywhere(apart()), anywhere(apart(bytes_per_s=1e10))
    assert (slow.codec, fast.codec) == (KvCodec.INT8, KvCodec.RAW)
    assert anywhere(apart(codecs=(KvCodec.RAW,))).rate(lambda choice: 8.0) < slow.rate(lambda choice: 8.0)


def test_kv_that_stays_within_a_node_is_never_coded() -> None:
    (inside,) = Networks(problem(codecs=BOTH)).between("gpu", "gpu")
    assert (inside.codec, inside.rate(1, 1)) == (KvCodec.RAW, float("inf"))


def test_the_form_is_in_the_placement_file_and_in_what_is_simulated(tmp_path: Path) -> None:
    one = apart()
    placed = lay_out(one, anywhere(one))
    written = placement_of(placed, KvCodec.INT8)
    write_placement(written, tmp_path / "placement.yaml")
    assert read_placement(tmp_path / "placement.yaml") == written
    assert cluster_of(one, placed, KvCodec.INT8).kv_transfer_dtype is KvTransferDtype.INT8
    assert "kv_transfer_dtype: int8" in (tmp_path / "placement.yaml").read_text()
