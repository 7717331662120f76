"""In which order a campaign plays its scripts, and what the neighbour does meanwhile."""

import random
from typing import cast

from disagg.calibration.steps.campaign import Series, play_in_turns
from disagg.calibration.steps.profiled_instance import ProfiledInstance
from disagg.calibration.steps.script import MeasuredStep, Script, ScriptResult


class FakeInstance:
    """Writes into a common diary what it was told, and answers every script at once."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self._name = name
        self._diary = diary

    def run(self, script: Script) -> ScriptResult:
        self._diary.append(f"{self._name} {len(script.decode_contexts)}")
        step = MeasuredStep(chunks=((7, 1),), time_s=0.5 * len(script.decode_contexts))
        return ScriptResult(decode_steps=(step,))

    def stop(self) -> None:
        self._diary.append(f"{self._name} stops")


def test_every_script_is_played_and_the_neighbour_computes_beside_its_own_series_alone() -> None:
    diary: list[str] = []
    instance, neighbour = (cast(ProfiledInstance, FakeInstance(name, diary)) for name in ("instance", "neighbour"))
    scripts = [Script(decode_contexts=(10,) * size) for size in (1, 2, 3)]
    series = {None: Series(scripts, 0.0, random.Random(0)), "decode": Series(scripts[:2], 0.0, random.Random(0))}
    told: list[tuple[str, float]] = []
    endless = Script(decode_contexts=(10,) * 9, is_endless=True)
    plays = {"decode": endless}
    play_in_turns(series, instance, neighbour, plays, lambda *progress: told.append(progress), diary.append)

    played = [entry for entry in diary if entry.startswith("instance")]
    assert sorted(played) == ["instance 1", "instance 1", "instance 2", "instance 2", "instance 3"]
    for beside in (1, 7):  # alone, beside the neighbour, alone again, ...
        assert diary[beside : beside + 2] == ["decode", "neighbour 9"]
        assert diary[beside + 2].startswith("instance")
        assert diary[beside + 3 : beside + 5] == ["neighbour stops", "decode"]
    assert [len(one.joined()) for one in series.values()] == [3, 2]
    assert [fraction for what, fraction in told if what == "steps alone"] == [1 / 3, 2 / 3, 1.0]
    assert [fraction for what, fraction in told if what == "steps beside decode"] == [0.5, 1.0]
