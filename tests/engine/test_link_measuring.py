"""Measuring a link beside the steps: whoever asked hears of the end, and nothing of it ends the instance."""

import threading
from typing import Any, cast

import pytest

from disagg.base.clock import MonotonicClock
from disagg.base.ids import InstanceId
from disagg.base.messages import MeasureLink
from disagg.engine.link_measuring import LinkMeasuring
from disagg.transfer.links import Links


class OneLink:
    """Links of which each can be opened."""

    def open(self, address: bytes, peer: str) -> Any:
        return object()

    def why(self, address: bytes) -> str:
        return "as a test"


def test_a_link_for_which_no_thread_can_start_is_told_as_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    woken: list[None] = []
    links = cast(Links, OneLink())
    measuring = LinkMeasuring(InstanceId("d"), "dd", links, MonotonicClock(), lambda: woken.append(None))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    measuring.start(MeasureLink(source=InstanceId("p"), incarnation="pp", pool=b"", access=b""))
    (measured,) = measuring.take_ended()
    assert measured.figure.failure == "can't start new thread"
    assert woken == [None]
