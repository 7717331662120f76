"""When a simulated instance's copies end: what is read behind a step is there when that has ended."""

import pytest
from simulated import pair

from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import KvOffer
from disagg.costs.links import LinkModel, SerialLinks
from disagg.costs.topology import Routes
from disagg.scheduling.instance.inputs import CopyEnded
from disagg.scheduling.instance.outputs import StartCopy
from disagg.simulator.copies import Copies
from disagg.simulator.event_queue import EventQueue
from disagg.simulator.step_ends import LAST_LAYER, StepEnds

P, D = InstanceId("prefill-0"), InstanceId("decode-0")
LIFE = "prefill-0.0"
READ_S = 0.32


class Reader:
    """A decode instance that reads behind step 7 of ``P``, which will end at ``end_s``."""

    def __init__(self, end_s: float) -> None:
        self.queue, self.step_ends, self.ended = EventQueue(), StepEnds(), list[CopyEnded]()
        spec = pair(link=LinkModel(bytes_per_s=1000 / READ_S, latency_s=0.0))
        links = SerialLinks(Routes(spec.topology, spec.places()).between)
        self.copies = Copies(D, links, self.step_ends, set(), self.queue.push, self.ended.append)
        self.step_ends.note(P, LIFE, 7, end_s)
        name = RequestId("a")
        offer = KvOffer(
            request_id=name,
            epoch=Epoch(0),
            source=P,
            incarnation=LIFE,
            num_tokens=16,
            block_size=16,
            block_ids=(BlockId(0),),
            lease_s=60.0,
            pool=b"",
            behind_step=7,
        )
        copy = StartCopy(request_id=name, epoch=Epoch(0), source=P, offer=offer, copies=(), expires_s=60.0)
        self.copies.start(copy, 1000, 0.0)

    def move_step(self, at_s: float, end_s: float) -> None:
        """The step goes on at another pace."""
        self.queue.push(at_s, lambda: self.step_ends.move(P, LIFE, 7, end_s))

    def end_s(self) -> float:
        self.queue.run()
        (ended,) = self.ended
        assert ended.ended_s <= self.queue.now()
        return ended.ended_s


def test_a_layer_is_left_when_the_step_has_ended() -> None:
    assert Reader(end_s=1.0).end_s() == pytest.approx(1.0 + READ_S * LAST_LAYER)
    assert Reader(end_s=0.1).end_s() == pytest.approx(READ_S)


@pytest.mark.parametrize("end_s", [0.7, 1.0, 1.4])
def test_a_step_that_ends_sooner_or_later_than_was_thought(end_s: float) -> None:
    reader = Reader(end_s=1.0)
    reader.move_step(0.2, 1.2)
    reader.move_step(0.5, end_s)
    assert reader.end_s() == pytest.approx(end_s + READ_S * LAST_LAYER)


def test_the_link_decides_where_it_is_slower_than_the_step() -> None:
    reader = Reader(end_s=1.0)
    reader.move_step(0.2, 0.25)
    assert reader.end_s() == pytest.approx(READ_S)


def test_a_step_that_moves_after_the_reader_died_is_of_no_interest() -> None:
    reader = Reader(end_s=1.0)
    reader.queue.push(0.1, reader.copies.drop)
    reader.move_step(0.2, 0.5)
    assert reader.end_s() == pytest.approx(1.0 + READ_S * LAST_LAYER)
