"""An audit waits for whoever can answer, and for nobody longer than it says."""

import asyncio

from disagg.base.errors import UnavailableError
from disagg.base.ids import InstanceId
from disagg.base.message_fields import Message
from disagg.base.messages import AuditBlocks, Audited, InstanceLoad
from disagg.serve.router.auditing import Auditing

D0, D1, D2 = (InstanceId(f"decode-{number}") for number in range(3))


def answer(instance: InstanceId, number: int) -> Audited:
    return Audited(instance=instance, incarnation="1", number=number, load=InstanceLoad(blocks_total=number))


async def test_who_answers_is_in_it_and_who_is_gone_or_silent_is_not() -> None:
    asked: list[tuple[InstanceId, Message]] = []

    def send(instance: InstanceId, message: Message) -> None:
        if instance == D2:
            raise UnavailableError("it is gone")
        asked.append((instance, message))
        if instance == D0:
            assert isinstance(message, AuditBlocks)
            asyncio.get_running_loop().call_soon(auditing.take, D0, answer(D0, message.number))

    auditing = Auditing(send, timeout_s=0.05)
    assert await auditing.ask([D0, D1, D2]) == {D0: answer(D0, 1)}
    assert [instance for instance, _ in asked] == [D0, D1]
    auditing.take(D1, answer(D1, 1))  # too late: nobody waits for it
    assert await auditing.ask([D0]) == {D0: answer(D0, 2)}


async def test_an_answer_to_another_router_is_not_taken_for_ones_own() -> None:
    def send(instance: InstanceId, message: Message) -> None:
        asyncio.get_running_loop().call_soon(auditing.take, instance, answer(instance, 1))

    auditing = Auditing(send, timeout_s=0.05, first=1 << 40)
    assert await auditing.ask([D0]) == {}
