"""Transfers that are coded on the way, over networks only."""

import pytest

from disagg.base.ids import InstanceId
from disagg.base.transfer_settings import KvTransferDtype
from disagg.costs.coded_links import CodecCost, CodedLinks
from disagg.costs.links import LinkKind, LinkModel, Route, SerialLinks

P0, D0 = InstanceId("prefill-0"), InstanceId("decode-0")
NUM_BYTES = 10_000_000
COST = CodecCost(bytes_share=0.5, bytes_per_s=5e9)


def end_s(dtype: KvTransferDtype, link: LinkModel, num_transfers: int = 1) -> float:
    """How long the last of some transfers takes that follow one another."""
    links = CodedLinks(SerialLinks(lambda source, target: Route.over(link)), dtype, COST)
    now = last = 0.0
    for _ in range(num_transfers):
        now, last = links.start(P0, D0, NUM_BYTES, now), now
    return now - last


@pytest.mark.parametrize(
    ("dtype", "kind", "time_s"),
    [
        (KvTransferDtype.RAW, LinkKind.TCP, 0.1),
        (KvTransferDtype.INT8, LinkKind.TCP, 0.05 + 0.002),
        (KvTransferDtype.INT8, LinkKind.SHM, 0.1),
    ],
)
def test_fewer_bytes_travel_and_coding_takes_time(dtype: KvTransferDtype, kind: LinkKind, time_s: float) -> None:
    assert end_s(dtype, LinkModel(1e8, kind=kind)) == pytest.approx(time_s)


@pytest.mark.parametrize(("bytes_per_s", "is_coded"), [(1e8, True), (1e9, True), (2e10, False)])
def test_the_quicker_form_is_found(bytes_per_s: float, is_coded: bool) -> None:
    link = LinkModel(bytes_per_s, kind=LinkKind.TCP)
    best = KvTransferDtype.INT8 if is_coded else KvTransferDtype.RAW
    assert end_s(KvTransferDtype.AUTO, link, 9) == pytest.approx(end_s(best, link))
