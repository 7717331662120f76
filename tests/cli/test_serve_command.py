"""``disagg serve`` up to the moment where instances would start, and what it shows."""

import json
import logging
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec import structs

from disagg.base.config import DType, SchedulingMode
from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.base.request import Role
from disagg.base.window_blocks import WindowBlocks
from disagg.cli.main import main
from disagg.cli.serve_display import PlainDisplay, instance_row
from disagg.cli.serve_output import make_display
from disagg.cli.serve_progress import ProgressDisplay
from disagg.scheduling.dispatch.state import InstanceState
from disagg.serve.launch import main as launch
from disagg.serve.launch.deployment import Deployment
from disagg.serve.router.interface import InstanceStatus

P0 = InstanceId("prefill-0")
FACTS = InstanceFacts(
    pid=42,
    device="cpu",
    kernel_backend="native",
    num_blocks=100,
    block_size=32,
    max_model_len=3200,
    vocab_size=49152,
    weight_bytes=1,
    kv_bytes=3 << 20,
    load_s=1.25,
    pool=b"",
)
MANY_FLAGS = """
    model-folder --prefill 2 --decode 1 --host ::1 --port 0 --dtype float32 --max-model-len 512
    --kv-memory 2GiB --block-size 16 --max-batch-tokens 64 --max-batch-size 8 --scheduling prefill-first
    --api-key secret --device cpu --cpus 0,1 --threads 1 --event-log logs
"""
STATUS = InstanceStatus(instance=P0, role=Role.PREFILL, state=InstanceState.READY, facts=FACTS)


@pytest.fixture
def deployments(monkeypatch: pytest.MonkeyPatch) -> list[Deployment]:
    """What would have been served."""
    found: list[Deployment] = []
    monkeypatch.setattr(launch, "serve", lambda deployment, _: found.append(deployment))
    return found


def run(*arguments: str):
    return CliRunner().invoke(main, ["serve", *arguments])


def test_without_flags_it_is_one_prefill_and_one_decode_instance_of_the_default_model(deployments):
    assert run().exit_code == 0
    (deployment,) = deployments
    assert deployment == Deployment(placement=deployment.placement)
    assert [deployment.placement.count(role) for role in Role] == [1, 1, 0]


def test_flags_reach_the_settings(deployments):
    result = run(*MANY_FLAGS.split())
    assert result.exit_code == 0, result.output
    (deployment,) = deployments
    assert deployment.model.model == "model-folder"
    assert deployment.model.dtype is DType.FLOAT32
    assert deployment.cache.kv_memory_bytes == 2 << 30
    assert deployment.scheduler.scheduling is SchedulingMode.PREFILL_FIRST
    assert deployment.serve.api_key == "secret"
    assert (deployment.host.cpus, deployment.host.threads, deployment.host.event_log) == ((0, 1), 1, "logs")
    assert deployment.placement.count(Role.PREFILL) == 2


def test_the_key_can_come_from_the_environment_so_that_no_list_of_processes_shows_it(deployments, monkeypatch):
    monkeypatch.setenv("DISAGG_API_KEY", "secret")
    run()
    assert deployments[0].serve.api_key == "secret"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "99999"], "99999"),
        (["--kv-memory", "lots"], "lots"),
        (["--dtype", "int4"], "int4"),
        (["--max-model-len", "1"], "x>=2"),
        (["--prefill", "-1"], "-1"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--prefill", "2", "--decode", "0"], "serves nothing"),
        (["--placement", "p.yaml", "--prefill", "1"], "leave out --prefill"),
        (["--placement", "no-such-file.yaml"], "no-such-file.yaml"),
    ],
)
def test_bad_flags_are_refused(deployments, arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not deployments


def test_a_model_that_is_not_there_is_refused_before_anything_is_started():
    result = run("./no/such/folder", "--port", "0")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: no such model: './no/such/folder'")
    assert "Traceback" not in result.output


def test_a_busy_port_is_refused_before_the_model_is_looked_at():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("./no/such/folder", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "is in use" in result.stderr


def test_a_broken_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    result = run(str(tmp_path), "--port", "0")
    assert result.exit_code == 2
    assert "config.json" in result.stderr


# What it shows --------------------------------------------------------------------------------------------------


def show(display: PlainDisplay) -> None:
    display.instance_loading(P0, "weights", 0.25)
    display.instance_loading(P0, "weights", 0.75)
    display.instance_ready(P0, FACTS)
    display.server_ready("http://127.0.0.1:1234", "tiny", (STATUS,))
    display.instance_line(P0, "a line of the instance")
    display.instance_lost(P0, "killed by SIGKILL", 0.0)
    display.instance_lost(P0, "killed by SIGKILL", 0.5)
    display.instance_lost(P0, "killed by SIGKILL", None)
    display.server_stopping("SIGINT", 5.0)
    display.close()


@pytest.mark.parametrize("kind", [PlainDisplay, ProgressDisplay])
def test_a_model_without_a_chat_template_is_not_offered_as_a_chat(kind, capsys):
    display = kind(as_json=False, started_s=0.0)
    display.model_read("tiny", can_chat=False)
    show(display)
    told = " ".join(capsys.readouterr().err.split())
    assert "disagg chat" not in told
    assert "/v1/chat/completions" not in told
    assert "no chat template" in told
    assert "curl http://127.0.0.1:1234/v1/completions" in told
    assert '"prompt": "' in told


@pytest.mark.parametrize("kind", [PlainDisplay, ProgressDisplay])
def test_the_display_says_everything_that_a_person_needs(kind, capsys):
    show(kind(as_json=False, started_s=0.0))
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    for words in (
        "prefill-0: ready after 1.2 s",
        "serves tiny on http://127.0.0.1:1234",
        "curl http://127.0.0.1:1234/v1/chat/completions",
        "disagg chat --url http://127.0.0.1:1234",
        "native",
        "100 x 32 tokens, 3MiB",
        "[prefill-0] a line of the instance",
        "prefill-0 died: killed by SIGKILL; restarting it\n",
        "restarting it in 0.5 s",
        "given up",
        "SIGINT: stopping",
    ):
        assert words in stderr, words


def test_each_stage_of_loading_is_one_line(capsys):
    show(PlainDisplay(as_json=False, started_s=0.0))
    assert capsys.readouterr().err.count("loading weights") == 1


def test_json_is_one_line_on_stdout(capsys):
    show(PlainDisplay(as_json=True, started_s=0.0))
    message = json.loads(capsys.readouterr().out)
    assert message["url"] == "http://127.0.0.1:1234"
    assert message["model"] == "tiny"
    assert message["instances"] == [
        {"instance": "prefill-0", "role": "prefill", "pid": 42, "max_model_len": 3200},
    ]


def test_log_messages_take_the_same_way(capsys):
    with make_display(as_json=False, level=logging.INFO):
        logging.getLogger("disagg.test").info("hello from the log")
        logging.getLogger("disagg.test").debug("not shown")
        logging.getLogger("library").info("not shown")
    logging.getLogger("disagg.test").info("not shown")
    stderr = capsys.readouterr().err
    assert "INFO disagg.test: hello from the log" in stderr
    assert "not shown" not in stderr


def test_nothing_in_a_log_message_can_look_like_another(capsys):
    forged = "x\n12:00:00 ERROR disagg: forged"
    with make_display(as_json=False, level=logging.INFO):
        logging.getLogger("disagg.test").info("a client said %s", forged)
        try:
            raise ValueError(forged)
        except ValueError:
            logging.getLogger("disagg.test").exception("a fault")
    assert not [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("12:00:00 ERROR disagg: forged")
    ]


def test_blocks_of_some_layers_are_not_called_tokens():
    facts = structs.replace(FACTS, window=WindowBlocks(1024, 5))
    assert "100 blocks, 3MiB" in instance_row(structs.replace(STATUS, facts=facts))
