"""The audit of one instance names the blocks that somebody holds without saying so, or only says that he holds."""

from disagg.base.config import SchedulerSettings
from disagg.base.ids import BlockId, Epoch, InstanceId, RequestId
from disagg.base.messages import AuditBlocks, Audited, KvOffer, Pulled
from disagg.scheduling.instance.core import InstanceCore
from disagg.scheduling.instance.header import InstanceHeader
from disagg.scheduling.instance.inputs import Continue, CopyEnded, CopySettled, SequenceFacts, Start
from disagg.scheduling.step.events import Arrived, StepDone, StepResult
from disagg.scheduling.step.scheduler import StepScheduler

A = RequestId("a")


def running() -> StepScheduler:
    """Six blocks of which a sequence holds three."""
    scheduler = StepScheduler(SchedulerSettings(), 6, 4)
    scheduler.handle([Arrived(request_id=A, epoch=Epoch(1), num_tokens=10, max_total_tokens=20)], 0.0)
    return scheduler


def test_a_sound_instance_has_no_faults() -> None:
    scheduler = running()
    assert scheduler.block_faults() == ()
    scheduler.handle([StepDone(step_id=1, results=(StepResult(A),))], 1.0)
    assert scheduler.block_faults() == ()


def test_a_block_that_nobody_says_to_hold_is_named() -> None:
    scheduler = running()
    scheduler._books.ledger.pool.allocate(1)
    (fault,) = scheduler.block_faults()
    assert fault == "block 3 (active) is held by 1 sequences and 0 leases, and 0 and 0 say that they hold it"


def test_a_block_that_somebody_holds_only_by_his_own_word_is_named() -> None:
    scheduler = running()
    scheduler._books.ledger.pool.release((BlockId(1),))
    assert [fault[:14] for fault in scheduler.block_faults()] == ["block 1 (free)"]


def test_a_block_that_a_lost_writer_fills_is_named() -> None:
    scheduler = running()
    scheduler._books.ledger.pool.reserve(1)
    assert scheduler.block_faults() == ("block 3 is filling, and 0 pulls say that they write it",)


def test_an_instance_answers_after_what_came_with_the_question() -> None:
    header = InstanceHeader(instance=InstanceId("decode-0"), settings=SchedulerSettings(), num_blocks=6, block_size=4)
    core = InstanceCore(header)
    facts = SequenceFacts(request_id=A, epoch=Epoch(1), num_tokens=10, max_total_tokens=20)
    outputs = core.handle([AuditBlocks(number=7), Start(sequence=facts)], 0.0)
    (answer,) = (one for one in outputs if isinstance(one, Audited))
    assert (answer.number, answer.faults) == (7, ())
    assert (answer.load.blocks_active, answer.load.blocks_free) == (3, 3)


def test_blocks_of_a_copy_that_hangs_are_nobodys_until_it_has_settled() -> None:
    header = InstanceHeader(instance=InstanceId("decode-0"), settings=SchedulerSettings(), num_blocks=9, block_size=4)
    core = InstanceCore(header)
    offer = KvOffer(
        request_id=A,
        epoch=Epoch(1),
        source=InstanceId("prefill-0"),
        incarnation="aa",
        num_tokens=10,
        block_size=4,
        block_ids=(BlockId(5), BlockId(6), BlockId(7)),
        lease_s=9.0,
        pool=b"",
    )
    facts = SequenceFacts(request_id=A, epoch=Epoch(1), num_tokens=11, max_total_tokens=20)
    core.handle([Continue(sequence=facts, offer=offer)], 0.0)
    hung = CopyEnded(
        request_id=A, epoch=Epoch(1), num_bytes=0, started_s=0.0, ended_s=1.0, failure="it hangs", may_still_write=True
    )
    outputs = core.handle([hung], 1.0)
    assert (core.audit().quarantined, core.audit().active) == (
        3,
        3,
    )  # what did not come is computed here, in other blocks
    assert [one.failure for one in outputs if isinstance(one, Pulled)] == ["it hangs"]
    core.handle([CopySettled(request_id=A, epoch=Epoch(1))], 2.0)
    assert (core.audit().quarantined, core.audit().active) == (0, 3)
    core.validate()
