"""Rules of the whole tree that no linter knows: no import cycles, one name for one thing, PyTorch in few rooms."""

import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

import disagg

GRAPH = grimp.build_graph("disagg")
SOURCES = Path(disagg.__file__).parent


def cycles(imports: dict[str, set[str]]) -> Iterator[list[str]]:
    """Yield each set of modules that import one another, directly or not (Kosaraju's algorithm)."""
    importers: dict[str, set[str]] = {module: set() for module in imports}
    for importer, imported in imports.items():
        for module in imported:
            importers[module].add(importer)
    seen: set[str] = set()
    finished = [module for start in imports for module in _reachable(start, imports, seen)]
    seen = set()
    for start in reversed(finished):
        together = _reachable(start, importers, seen)
        if len(together) > 1:
            yield sorted(together)


def _reachable(start: str, edges: dict[str, set[str]], seen: set[str]) -> list[str]:
    """Return what can be reached and was not ``seen``, each after all that can be reached from it alone."""
    finished: list[str] = []
    path = [] if start in seen else [(start, iter(edges[start]))]
    seen.add(start)
    while path:
        _, left = path[-1]
        following = next((one for one in left if one not in seen), None)
        if following is None:
            finished.append(path.pop()[0])
        else:
            seen.add(following)
            path.append((following, iter(edges[following])))
    return finished


def test_cycles_are_found() -> None:
    assert list(cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()})) == [["b", "c"]]
    assert list(cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()})) == []


def test_no_modules_import_one_another() -> None:
    imports = {module: GRAPH.find_modules_directly_imported_by(module) for module in GRAPH.modules}
    assert list(cycles(imports)) == []


def test_no_two_public_classes_have_one_name() -> None:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for path in sorted(SOURCES.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(SOURCES)))
    shared = {name: paths for name, paths in found.items() if len(paths) > 1}
    assert shared == {}


def test_no_two_test_modules_have_one_name() -> None:
    """They are imported by their names alone: of two, one would hide the other."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("*.py"))
    assert [name for name, number in names.items() if number > 1 and name != "conftest.py"] == []


@pytest.mark.parametrize(
    "room", ["cache", "costs", "scheduling", "simulator", "placement", "measure", "models", "serve"]
)
def test_no_module_of_a_room_without_tensors_loads_torch(room: str) -> None:
    modules = sorted(module for module in GRAPH.modules if module.startswith(f"disagg.{room}"))
    program = (
        f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert output.stdout.strip() == "False"
