"""The course of a simulation as a page: a lane of steps for each instance, hand-overs as arrows between lanes."""

from array import array
from pathlib import Path
from typing import Final

import msgspec

from disagg.base.errors import ConfigurationError
from disagg.base.ids import InstanceId
from disagg.costs.latency import StepShape

MAX_STEPS: Final = 20_000
"""Steps and hand-overs that a page shows; a browser draws as many without effort."""


class Lane(msgspec.Struct, frozen=True, kw_only=True):
    """The steps of one instance, as columns of equal length."""

    instance: str
    start_s: tuple[float, ...]
    end_s: tuple[float, ...]
    prefill_tokens: tuple[int, ...]
    decodes: tuple[int, ...]


class HandOver(msgspec.Struct, frozen=True, array_like=True):
    """One pull of KV blocks, between lanes given by their index."""

    request_id: str
    source: int
    target: int
    start_s: float
    end_s: float


class _Columns:
    def __init__(self) -> None:
        self.start_s, self.end_s = array("d"), array("d")
        self.prefill_tokens, self.decodes = array("q"), array("q")


class TimelineRecorder:
    """Takes what happens and keeps the first ``MAX_STEPS`` steps and hand-overs of all."""

    def __init__(self, instances: tuple[InstanceId, ...]) -> None:
        self._columns = {name: _Columns() for name in instances}
        self._index = {name: index for index, name in enumerate(instances)}
        self._hand_overs: list[HandOver] = []
        self._num_left = MAX_STEPS

    def step(self, instance: InstanceId, start_s: float, end_s: float, shape: StepShape) -> None:
        """Note a step."""
        if self._num_left:
            self._num_left -= 1
            columns = self._columns[instance]
            columns.start_s.append(start_s)
            columns.end_s.append(end_s)
            columns.prefill_tokens.append(shape.num_prefill_tokens)
            columns.decodes.append(shape.num_decodes)

    def pull(self, request_id: str, source: InstanceId, target: InstanceId, start_s: float, end_s: float) -> None:
        """Note a pull."""
        if self._num_left:
            self._num_left -= 1
            self._hand_overs.append(HandOver(request_id, self._index[source], self._index[target], start_s, end_s))

    def write(self, path: Path, title: str) -> None:
        """Write the page; raise ConfigurationError when the file cannot be written."""
        lanes = [
            Lane(
                instance=name,
                start_s=tuple(columns.start_s),
                end_s=tuple(columns.end_s),
                prefill_tokens=tuple(columns.prefill_tokens),
                decodes=tuple(columns.decodes),
            )
            for name, columns in self._columns.items()
        ]
        data = {"title": title, "lanes": lanes, "hand_overs": self._hand_overs, "is_cut": self._num_left == 0}
        # "<" must not end the script element, whatever a request is called.
        text = msgspec.json.encode(data).decode().replace("<", "\\u003c")
        page = (Path(__file__).parent / "timeline.html").read_text(encoding="utf-8").replace("__DATA__", text)
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"cannot write the timeline {path}: {error.strerror}") from error
