"""``disagg chat`` against a small server that speaks as much of the API as it needs."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from disagg.cli.chat import Conversation
from disagg.cli.chat_client import ChatAnswer, ChatClient, ShownPiece
from disagg.cli.main import main

Event = dict[str, Any]


def delta(text: str) -> Event:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], "usage": None}


def usage(num_tokens: int) -> Event:
    return {"choices": [], "usage": {"completion_tokens": num_tokens}}


class FakeServer:
    """Answers every chat with ``events``; keeps what it was asked."""

    def __init__(self) -> None:
        self.events: list[Event] = [delta("Hel"), delta("lo."), usage(2)]
        self.status = 200
        self.models: Any = {"data": [{"id": "tiny"}]}
        self.asked: list[Event] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.append(self.headers["authorization"])
                self._answer(200, json.dumps(outer.models).encode())

            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                if outer.status != 200:
                    self._answer(outer.status, json.dumps({"error": {"message": "no such model: 'x'"}}).encode())
                    return
                lines = [*(json.dumps(event) for event in outer.events), "[DONE]"]
                self._answer(200, "".join(f"data: {line}\n\n" for line in lines).encode())

            def _answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


def chat(server: FakeServer, *arguments: str, piped: str = "hi\n"):
    return CliRunner().invoke(main, ["chat", "--url", server.url, *arguments], input=piped)


def test_what_is_piped_in_is_answered(server):
    result = chat(server)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "Hello.\n", "")
    assert server.asked == [
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


def test_options_reach_the_server(server):
    flags = "--model other --system Brief. --max-tokens 5 --temperature 0 --seed 3"
    result = chat(server, *flags.split())
    assert result.exit_code == 0, result.output
    (body,) = server.asked
    assert body["messages"][0] == {"role": "system", "content": "Brief."}
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("other", 5, 0.0, 3)


def test_the_key_is_sent(server):
    chat(server, "--api-key", "secret")
    assert server.keys == ["Bearer secret"]


def test_no_server_says_how_to_start_one(server):
    server.close()
    result = chat(server)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no answer from {server.url}")
    assert "disagg serve" in result.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://[", "ftp://x"])
def test_what_is_no_url_is_refused(url):
    result = CliRunner().invoke(main, ["chat", "--url", url], input="hi")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert url in result.stderr


def test_another_kind_of_server_is_recognised(server):
    server.models = ["something else"]
    result = chat(server)
    assert result.exit_code == 1
    assert "does not speak OpenAI's API" in result.stderr


def test_a_refusal_is_shown_in_the_servers_words(server):
    server.status = 404
    assert chat(server).stderr == "error: no such model: 'x'\n"


def test_an_error_in_the_middle_of_an_answer_is_shown(server):
    server.events = [delta("Hel"), {"error": {"message": "instance decode-0 died"}}]
    result = chat(server)
    assert (result.exit_code, result.stdout) == (1, "Hel")
    assert result.stderr == "error: instance decode-0 died\n"


# Conversations --------------------------------------------------------------------------------------------------


@pytest.fixture
def converse(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Type lines into a conversation; Ctrl-D follows the last."""

    def run(*lines: str) -> None:
        typed = iter(lines)

        def read(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        with ChatClient(server.url, None, None, {}) as client:
            Conversation(client, "Brief.").run()

    return run


def test_a_conversation_remembers_until_it_is_cleared(server, converse):
    converse("one", "", "two", "/clear", "three", "/exit", "never")
    said = [[message["content"] for message in body["messages"]] for body in server.asked]
    assert said == [["Brief.", "one"], ["Brief.", "one", "Hello.", "two"], ["Brief.", "three"]]


def test_the_speed_is_shown_and_unknown_commands_are_explained(server, converse, capsys):
    converse("one", "/help")
    stdout, stderr = capsys.readouterr()
    assert stdout == "Hello.\n"
    assert "2 tokens" in stderr
    assert "/clear forgets" in stderr


def call(name: str | None, arguments: str, call_id: str | None = None) -> Event:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": call_id, "function": function}]}}]}


def test_reasoning_and_calls_are_shown_and_what_the_user_says_goes_back(server, converse, capsys):
    reasoning = {"choices": [{"index": 0, "delta": {"reasoning_content": "Hm."}}]}
    server.events = [reasoning, call("weather", "", "x1"), call(None, '{"city": '), call(None, '"Ulm"}'), usage(9)]
    converse("How is it in Ulm?", "21 degrees")
    stdout, stderr = capsys.readouterr()
    assert stdout.count("Hm.") == 2
    assert '→ weather({"city": "Ulm"})' in stdout
    assert "9 tokens" in stderr
    *_, answer, result = server.asked[1]["messages"]
    assert answer["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    assert result == {"role": "tool", "tool_call_id": "x1", "content": "21 degrees"}


def test_tools_are_read_from_a_file(server, tmp_path):
    file = tmp_path / "tools.json"
    file.write_text('[{"type": "function", "function": {"name": "f"}}]')
    chat(server, "--tools", str(file))
    assert server.asked[0]["tools"] == [{"type": "function", "function": {"name": "f"}}]
    for text in ("{", "{}"):
        file.write_text(text)
        result = chat(server, "--tools", str(file))
        assert result.exit_code == 2
        assert str(file) in result.stderr


def test_ctrl_c_stops_an_answer_and_keeps_what_came():
    class Interrupted:
        def stream(self, messages: list[dict[str, str]], answer: ChatAnswer) -> Iterator[ShownPiece]:
            piece = ShownPiece("Hel")
            answer.add(piece)
            yield piece
            raise KeyboardInterrupt

    conversation = Conversation(Interrupted(), None)
    assert conversation.ask("hi").describe().startswith("[stopped; first token after")
    assert conversation._messages[-1] == {"role": "assistant", "content": "Hel"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            ChatAnswer(asked_s=1.0, first_s=1.5, last_s=2.5, num_tokens=11),
            "[11 tokens, 10.0 tokens/s, first token after 500 ms]",
        ),
        (ChatAnswer(asked_s=1.0, first_s=1.5, last_s=1.5, num_tokens=1), "[first token after 500 ms]"),
        (ChatAnswer(asked_s=1.0), "[no answer]"),
        (ChatAnswer(asked_s=1.0, stopped=True), "[stopped]"),
    ],
)
def test_the_speed_in_words(answer, words):
    assert answer.describe() == words
