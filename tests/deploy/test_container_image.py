"""The Dockerfile: stages, who it runs as, and that what it copies and starts is there."""

import json
import re
from pathlib import Path

import yaml

from disagg.cli.serve import serve

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
Instruction = tuple[str, str]


def stages() -> list[list[Instruction]]:
    """The instructions, stage by stage."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.partition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    found: list[list[Instruction]] = []
    for name, _, rest in lines:
        if name == "FROM":
            found.append([])
        found[-1].append((name, rest))
    return found


def test_the_compiler_stays_in_the_first_stage() -> None:
    build, final = stages()
    assert any("g++" in rest for name, rest in build if name == "RUN")
    assert not any(re.search(r"apt-get|g\+\+|gcc|pip install", rest) for _, rest in final)
    assert ("COPY", "--from=build /opt/disagg /opt/disagg") in final


def test_it_does_not_run_as_root_and_pods_run_as_the_same_user() -> None:
    (user,) = [rest for name, rest in stages()[-1] if name == "USER"]
    assert user == "10001:10001"
    router = next(yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "base" / "router.yaml").read_text()))
    security = router["spec"]["template"]["spec"]["securityContext"]
    assert user == f"{security['runAsUser']}:{security['runAsGroup']}"


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {source for name, rest in stages()[0] if name == "COPY" for source in rest.split()[:-1]}
    assert copied == sent
    assert all((ROOT / source).exists() for source in copied)


def test_the_model_in_the_image_is_that_of_make() -> None:
    (pinned,) = re.findall(r"^DEFAULT_MODEL := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert any(pinned in rest for name, rest in stages()[0] if name == "RUN")


def test_it_serves_by_default() -> None:
    final = dict(stages()[-1])
    assert json.loads(final["ENTRYPOINT"]) == ["disagg"]
    command, *arguments = json.loads(final["CMD"])
    assert command == "serve"
    assert serve.make_context("serve", arguments).params["host"] == "0.0.0.0"
