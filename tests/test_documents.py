"""What the documents name exists: files, headings, sub-commands and their flags, paths of the tree."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from disagg.cli.main import main

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```.*?^```\s*$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^ {4}\S.*$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
COMMAND = re.compile(r"\bdisagg((?: +\S+)+)")
FLAG = re.compile(r"--[a-z][a-z0-9-]*")
PATH = re.compile(r"(?<![\w./-])(?:benchmarks|deploy|src|tests|monitoring|docs)/[\w./@-]*\w")

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page without its fences."""
    names: set[str] = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        same = 0
        while (name := f"{slug}-{same}" if same else slug) in names:
            same += 1
        names.add(name)
    return names


def code(text: str) -> Iterator[str]:
    """Yield the code of a page, a line or an inline piece each; a line that ends in a backslash goes on."""
    text = text.replace("\\\n", " ")
    for fence in FENCE.findall(text):
        yield from fence.splitlines()[1:-1]
    text = FENCE.sub("", text)
    yield from (line.strip() for line in INDENTED.findall(text))
    yield from (piece.replace("\n", " ") for piece in INLINE.findall(INDENTED.sub("", text)))


def wrong_links(document: Path, text: str) -> list[str]:
    """Return the relative links that lead nowhere."""
    wrong = []
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(text if file == document else file.read_text())):
            wrong.append(target)
    return wrong


def wrong_flags(line: str) -> list[str]:
    """Return what a line says of ``disagg`` that its commands do not have."""
    wrong = []
    for said in COMMAND.findall(re.split(r" #|[;|]", re.sub(r"(?<= )\[|\]", " ", line))[0]):
        command: click.Command = main
        for word in said.split():
            if not isinstance(command, click.Group) or not re.fullmatch(r"[a-z][a-z-]*", word):
                break
            inner = command.get_command(click.Context(command), word)
            if inner is None:
                wrong.append(f"{command.name} {word}")
                break
            command = inner
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        wrong += [f"{command.name} {flag}" for flag in FLAG.findall(said) if flag not in known | {"--help"}]
    return wrong


@documents
def test_links_lead_somewhere(document: Path) -> None:
    assert wrong_links(document, document.read_text()) == []


@documents
def test_commands_have_the_flags_that_are_named(document: Path) -> None:
    assert [wrong for line in code(document.read_text()) for wrong in wrong_flags(line)] == []


@documents
def test_paths_exist(document: Path) -> None:
    text = FENCE.sub("", LINK.sub("", document.read_text()))
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in DOCUMENTS if page.is_relative_to(ROOT / "docs")}
    assert pages - {target.partition("#")[0] for target in LINK.findall(index)} == {"README.md"}


def test_what_is_wrong_is_found() -> None:
    assert wrong_flags("disagg bench serve --no-such-flag 3") == ["serve --no-such-flag"]
    assert wrong_flags("disagg bench nothing") == ["bench nothing"]
    assert wrong_flags("disagg serve --prefill 1 [--decode M] # --no-such-flag") == []
    assert wrong_links(DOCUMENTS[0], "[a](docs/nothing.md) [b](#nothing) [c](#heading)\n\n# Heading") == [
        "docs/nothing.md",
        "#nothing",
    ]
    assert anchors("# What's `x`?\n\n# Two\n\n# Two") == {"whats-x", "two", "two-1"}
