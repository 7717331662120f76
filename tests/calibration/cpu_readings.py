"""Readings of CPU clocks, made up."""

from disagg.calibration.measured_load import CpuReadings


def readings(*taken: tuple[float, float]) -> CpuReadings:
    """Return readings of (moment, CPU seconds)."""
    values = iter(cpu_s for _, cpu_s in taken)
    found = CpuReadings(lambda: next(values))
    for moment_s, _ in taken:
        found.read(moment_s)
    return found
