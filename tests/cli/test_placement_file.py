"""Placements from flags and files."""

from pathlib import Path

import pytest

from disagg.base.config import InstanceGroup, Placement, RouterSettings
from disagg.base.errors import ConfigurationError
from disagg.base.objectives import Objectives
from disagg.base.request import Role
from disagg.base.service_classes import Overload, ServiceClass
from disagg.base.tenants import TenantSettings
from disagg.cli.placement_file import choose_placement, classes_of, read_placement, write_placement

GROUP = "{groups: [{role: colocated, count: 1}]"


def counts(prefill: int | None = None, decode: int | None = None, colocated: int | None = None):
    return {Role.PREFILL: prefill, Role.DECODE: decode, Role.COLOCATED: colocated}


def numbers(placement: Placement) -> tuple[int, int, int]:
    return placement.count(Role.PREFILL), placement.count(Role.DECODE), placement.count(Role.COLOCATED)


def write(folder: Path, text: str) -> Path:
    file = folder / "placement.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (counts(), (1, 1, 0)),
        (counts(prefill=2, decode=3), (2, 3, 0)),
        (counts(colocated=2), (0, 0, 2)),
        (counts(prefill=1, decode=1, colocated=1), (1, 1, 1)),
        (counts(prefill=0, decode=0, colocated=1), (0, 0, 1)),
    ],
)
def test_from_flags(given, expected):
    assert numbers(choose_placement(None, given)) == expected


def test_flags_that_serve_nothing_are_refused():
    with pytest.raises(ConfigurationError, match="2 prefill, 0 decode and 0 colocated"):
        choose_placement(None, counts(prefill=2))


def test_from_a_file(tmp_path):
    file = write(
        tmp_path,
        """
        groups:
          - {role: prefill, count: 2, num_threads: 1}
          - {role: decode, count: 1, num_threads: 2}
        """,
    )
    assert choose_placement(file, counts()) == Placement(
        groups=(
            InstanceGroup(role=Role.PREFILL, count=2, num_threads=1),
            InstanceGroup(role=Role.DECODE, count=1, num_threads=2),
        )
    )


def test_classes_of_service_are_read_and_written(tmp_path):
    text = f"{GROUP}, classes: {{chat: {{slo: 'ttft=500ms,tpot=50ms', priority: -10, overload: shed}}, batch: {{}}}}}}"
    placement = choose_placement(write(tmp_path, text), counts())
    assert classes_of(placement) == {
        "chat": ServiceClass(objectives=Objectives(ttft_s=0.5, tpot_s=0.05), priority=-10, overload=Overload.SHED),
        "batch": ServiceClass(),
    }
    written = tmp_path / "written.yaml"
    write_placement(placement, written)
    assert read_placement(written) == placement


def test_whether_cores_are_lent_is_read_and_written(tmp_path):
    placement = choose_placement(write(tmp_path, f"{GROUP}, lend_cores: true}}"), counts())
    assert placement.lend_cores is True
    write_placement(placement, tmp_path / "written.yaml")
    assert read_placement(tmp_path / "written.yaml") == placement


def test_a_tenant_has_a_class_that_there_is():
    tenants = {"nightly": TenantSettings(service_class="bath")}
    with pytest.raises(ConfigurationError, match=r"tenant nightly .*'bath'.*there is batch; did you mean batch\?"):
        RouterSettings(tenants=tenants, classes={"batch": ServiceClass()})
    assert RouterSettings(tenants={"a": TenantSettings(service_class="b")}, classes={"b": ServiceClass()}).predicts


def test_predictions_are_wanted_where_any_class_needs_them():
    assert not RouterSettings(classes={"batch": ServiceClass(overload=Overload.QUEUE)}).predicts
    assert RouterSettings(classes={"chat": ServiceClass(overload=Overload.SHED)}).predicts
    assert not RouterSettings(classes={"chat": ServiceClass()}).predicts


def test_a_file_and_flags_contradict_each_other(tmp_path):
    with pytest.raises(ConfigurationError, match="leave out --prefill and --colocated"):
        choose_placement(tmp_path / "placement.yaml", counts(prefill=1, colocated=1))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("groups: [{role: prefill, count: 1, colour: red}]", r"unknown field `colour`.*groups\[0\]"),
        ("groups: [{role: prefil, count: 1}]", "Invalid enum value 'prefil'"),
        ("groups: [{role: prefil, count: 1}]", r"there are .*prefill.*; did you mean prefill\?"),
        ("instances: [{role: prefill, count: 1}]", "unknown field `instances`; there are groups"),
        ("groups: [{rol: prefill, count: 1}]", r"unknown field `rol`.*there are role, count.*did you mean role\?"),
        ("groups: [{role: prefill, count: 1, tensor_paralel: 2}]", r"did you mean tensor_parallel\?"),
        ("groups: [{role: prefill, count: 99999999999}]", "`int` <= 4096"),
        ("groups: [{role: prefill, count: -1}]", "`int` >= 1"),
        ("groups: [{role: prefill, count: .inf}]", r"groups\[0\].count"),
        ("groups: [{role: prefill, count: .nan}]", r"groups\[0\].count"),
        ("groups: [{role: prefill, count: 1, tensor_parallel: 1000000}]", "`int` <= 1024"),
        ("groups: 2024-99-99", "month must be"),
        ("[" * 3000, "recursion"),
        ("&a [*a]", "is not a placement"),
        ("groups: [{role: prefill, count: 0}]", "`int` >= 1"),
        ("groups: [{role: prefill, count: 1}]", "1 prefill, 0 decode"),
        ("groups: [", "is not a placement"),
        ("", "is not a placement"),
        (
            f"{GROUP}, classes: {{chat: {{slo: ttft=5}}}}}}",
            "slo of the class chat: 'ttft=5' is not a pair of objectives",
        ),
        (f"{GROUP}, classes: {{chat: {{slo: ttfb=5ms}}}}}}", "no objective is called 'ttfb'"),
        (f"{GROUP}, classes: {{chat: {{overload: drop}}}}}}", "'drop'.*classes.*there are queue, best-effort, shed"),
        (f"{GROUP}, classes: {{chat: {{prio: 1}}}}}}", r"unknown field `prio`.*did you mean priority\?"),
        (f"{GROUP}, classes: {{a b: {{}}}}}}", "regex"),
        ("[1, 2]", "is not a placement"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_place(tmp_path, text, words):
    file = write(tmp_path, text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        choose_placement(file, counts())
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    file = tmp_path / "placement.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"cannot read the placement .*placement\.yaml"):
        choose_placement(file, counts())
