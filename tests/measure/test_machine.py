import msgspec

from disagg.measure.machine import INSTRUCTION_SETS, Machine, parse_cpu_facts, this_machine

X86 = (
    "processor\t: 0\nmodel name\t: AMD EPYC 9755\nflags\t\t: fpu avx2 avx512_bf16\n\nprocessor\t: 1\nmodel name\t: x\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 sve\nCPU part\t: 0xd4f\n"


def test_processor_and_flags_are_read_on_x86_and_arm() -> None:
    assert parse_cpu_facts(X86) == ("AMD EPYC 9755", frozenset({"fpu", "avx2", "avx512_bf16"}))
    assert parse_cpu_facts(ARM) == ("", frozenset({"fp", "asimd", "bf16", "sve"}))
    assert parse_cpu_facts("") == ("", frozenset())


def test_this_machine_can_be_told_and_saved() -> None:
    machine = this_machine()
    assert machine.num_cores >= 1
    assert machine.memory_bytes > 1 << 20
    assert set(machine.instruction_sets) <= set(INSTRUCTION_SETS)
    assert machine.packages["disagg"]
    assert machine.facts()["Python"] == machine.python
    assert msgspec.json.decode(msgspec.json.encode(machine), type=Machine) == machine
