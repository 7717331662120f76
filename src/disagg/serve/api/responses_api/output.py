"""Pieces of an answer to the items of a response, and to the events that tell of them."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Final

from msgspec import UNSET

from disagg.models.tool_calls.parsing import Piece, PieceKind
from disagg.serve.api.responses_api.items import (
    FunctionCallItem,
    ItemEvent,
    MessageItem,
    OutputItem,
    OutputText,
    PieceEvent,
    ReasoningItem,
)

_PREFIXES: Final = {PieceKind.CONTENT: "msg", PieceKind.REASONING: "rs", PieceKind.CALL: "fc"}
_PARTS: Final = {PieceKind.CONTENT: "output_text", PieceKind.REASONING: "reasoning_text"}
AnyEvent = ItemEvent | PieceEvent


class OutputWriter:
    """The items of one response, in the order in which they come. Its events are numbered from ``first_number`` on."""

    def __init__(self, first_number: int) -> None:
        self._next_number = first_number
        self.items: list[OutputItem] = []
        self._open: _OpenItem | None = None

    def number(self) -> int:
        """Return the next event's number."""
        self._next_number += 1
        return self._next_number - 1

    def take(self, pieces: Sequence[Piece]) -> list[AnyEvent]:
        """Return the events of more pieces."""
        events: list[AnyEvent] = []
        for piece in pieces:
            events += self._take(piece)
        return events

    def finish(self, status: str) -> list[AnyEvent]:
        """Return the events of the answer's end."""
        return list(self._close(status))

    def _take(self, piece: Piece) -> Iterator[AnyEvent]:
        kind = PieceKind.CALL if piece.kind is PieceKind.ARGUMENTS else piece.kind
        if self._open is None or self._open.kind is not kind or piece.kind is PieceKind.CALL:
            yield from self._close("completed")
            self._open = _OpenItem(kind, piece, len(self.items))
            yield self._item_event("added", self._open.item("in_progress"))
            if kind in _PARTS:
                yield self._event("content_part.added", self._open, part=self._open.part())
        if piece.kind is PieceKind.CALL:
            return
        self._open.text += piece.text
        name = "function_call_arguments" if kind is PieceKind.CALL else _PARTS[kind]
        yield self._event(f"{name}.delta", self._open, delta=piece.text)

    def _close(self, status: str) -> Iterator[AnyEvent]:
        done, self._open = self._open, None
        if done is None:
            return
        if done.kind is PieceKind.CALL:
            yield self._event("function_call_arguments.done", done, arguments=done.text, name=done.name)
        else:
            yield self._event(f"{_PARTS[done.kind]}.done", done, text=done.text)
            yield self._event("content_part.done", done, part=done.part())
        self.items.append(done.item(status))
        yield ItemEvent(
            type="response.output_item.done",
            sequence_number=self.number(),
            output_index=done.index,
            item=self.items[-1],
        )

    def _item_event(self, what: str, item: OutputItem) -> ItemEvent:
        return ItemEvent(
            type=f"response.output_item.{what}",
            sequence_number=self.number(),
            output_index=len(self.items),
            item=item,
        )

    def _event(
        self,
        what: str,
        item: "_OpenItem",
        *,
        part: OutputText | None = None,
        delta: str | None = None,
        text: str | None = None,
        arguments: str | None = None,
        name: str | None = None,
    ) -> PieceEvent:
        has_logprobs = what.startswith("output_text.")
        return PieceEvent(
            type=f"response.{what}",
            sequence_number=self.number(),
            item_id=item.item_id,
            output_index=item.index,
            content_index=UNSET if item.kind is PieceKind.CALL else 0,
            part=UNSET if part is None else part,
            delta=UNSET if delta is None else delta,
            text=UNSET if text is None else text,
            arguments=UNSET if arguments is None else arguments,
            name=UNSET if name is None else name,
            logprobs=[] if has_logprobs else UNSET,
        )


class _OpenItem:
    """The item that is being written."""

    def __init__(self, kind: PieceKind, first: Piece, index: int) -> None:
        self.kind = kind
        self.index = index
        self.item_id = f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"
        self.text = ""
        self.name = first.text if kind is PieceKind.CALL else ""
        self._call_id = first.call_id

    def part(self) -> OutputText:
        """Return the text so far as a part."""
        annotations: list[str] = []
        is_answer = self.kind is PieceKind.CONTENT
        return OutputText(self.text, _PARTS[self.kind], annotations if is_answer else UNSET)

    def item(self, status: str) -> OutputItem:
        """Return the item as it is now."""
        content = [self.part()] if self.text and self.kind in _PARTS else []
        match self.kind:
            case PieceKind.CONTENT:
                return MessageItem(id=self.item_id, content=content, status=status)
            case PieceKind.REASONING:
                return ReasoningItem(id=self.item_id, content=content, status=status)
        return FunctionCallItem(
            id=self.item_id, call_id=self._call_id, name=self.name, arguments=self.text, status=status
        )
