"""Which files one streamed chat passes: ``python benchmarks/request_files.py``.

Starts one prefill and one decode instance with a profiler in every process, asks for one chat, and prints the modules
of which a function ran, in the order of the first call, with the number of such functions. Functions that also run
while nothing is asked (load reports, signs of life) are left out.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

PHASES = ("start", "idle", "chat", "end")
IDLE_S, SETTLE_S, LOOK_S = 4.0, 1.5, 0.02
SOURCES = f"{os.sep}src{os.sep}disagg{os.sep}"


def record(folder: Path) -> None:
    """Note in this process, phase by phase, when a function ran first."""
    ran: dict[tuple[str, str], float] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            key = (code.co_filename, code.co_qualname)
            if key not in ran:
                ran[key] = time.monotonic()

    def write() -> None:
        phase = ""
        while phase != PHASES[-1]:
            current = (folder / "phase").read_text(encoding="utf-8")
            if current != phase:
                found = [(file, name, at_s) for (file, name), at_s in tuple(ran.items()) if SOURCES in file]
                (folder / f"{phase}.{os.getpid()}.json").write_text(json.dumps(found), encoding="utf-8")
                ran.clear()
                phase = current
            time.sleep(LOOK_S)

    threading.Thread(target=write, daemon=True).start()
    sys.setprofile(note)
    threading.setprofile(note)


def enter(folder: Path, phase: str, seconds: float) -> None:
    """Let all processes begin a phase, which lasts so long at least."""
    (folder / "next").write_text(phase, encoding="utf-8")
    (folder / "next").replace(folder / "phase")
    time.sleep(seconds)


def trace(folder: Path) -> None:
    """Run a server with profilers, and ask for a chat."""
    import httpx

    from disagg.bench.compare.server_process import running, serve_command

    program = f"import sys; sys.path.append({str(Path(__file__).parent)!r})\nimport request_files\n"
    program += f"from pathlib import Path\nrequest_files.record(Path({str(folder)!r}))\n"
    (folder / "sitecustomize.py").write_text(program, encoding="utf-8")
    enter(folder, PHASES[0], 0)
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = replace(serve_command("server", ("--prefill", "1", "--decode", "1")), environment={"PYTHONPATH": path})
    message = {"role": "user", "content": "Say something about the sea, please. " * 8}
    body = {"messages": [message], "max_tokens": 12, "temperature": 0, "stream": True}
    with running(command, folder / "log") as server:
        time.sleep(IDLE_S)
        enter(folder, "idle", IDLE_S)
        enter(folder, "chat", LOOK_S * 5)
        httpx.post(f"{server.command.url}/v1/chat/completions", json=body, timeout=120).raise_for_status()
        time.sleep(SETTLE_S)
        enter(folder, PHASES[-1], SETTLE_S)


def calls(folder: Path, phase: str) -> Iterator[tuple[str, str, str, float]]:
    """Yield process, file, function and time of all that ran in a phase."""
    for path in folder.glob(f"{phase}.*.json"):
        for file, name, at_s in json.loads(path.read_text(encoding="utf-8")):
            yield path.suffixes[0], file, name, at_s


def main() -> None:
    """Trace and print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace(folder)
        idle = {call[:3] for call in calls(folder, "idle")}
        found = [call for call in calls(folder, "chat") if call[:3] not in idle]
    began: dict[str, float] = {}
    for _, file, _, at_s in found:
        began[file] = min(at_s, began.get(file, at_s))
    functions = Counter(file for file, _ in {(file, name) for _, file, name, _ in found})
    for file in sorted(began, key=began.__getitem__):
        print(f"{file.partition(SOURCES)[2].removesuffix('.py'):45}{functions[file]:4}")
    print(f"{len(began)} modules")


if __name__ == "__main__":
    main()
