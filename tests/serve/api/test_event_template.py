"""An event from a template is the event that encoding the whole of it would give."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from disagg.serve.api.responses import ChatChunkChoice, Completion, EventTemplate, MessageDelta, event
from disagg.serve.api.shapes import ShownUsage


def made(text: str, usage: ShownUsage = UNSET) -> Completion:
    choice = ChatChunkChoice(index=3, delta=MessageDelta(text))
    return Completion('chat "1"', "chat.completion.chunk", 7, "a/model", [choice], usage)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text(text: str) -> None:
    assert EventTemplate(made).event(text) == event(made(text))


@pytest.mark.parametrize("usage", [UNSET, None])
def test_what_is_beside_the_text_stays(usage: ShownUsage) -> None:
    template = EventTemplate(lambda text: made(text, usage))
    for text in ("one", 'two "quoted"\n', "日本"):
        assert template.event(text) == event(made(text, usage))
