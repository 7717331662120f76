"""A server with OpenAI's API that streams a word every so often, in a process of its own. Run as a script."""

import argparse
import json
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    first_s = 0.0
    gap_s = 0.0
    lock = threading.Lock()

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "fake", "object": "model"}]}).encode()
        known = self.path == "/v1/models"
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        num_prompt_tokens = len(asked["prompt"].split())
        time.sleep(self.first_s)
        for number in range(asked["max_tokens"]):
            if number:
                time.sleep(self.gap_s)
            choice = {"index": 0, "text": " word", "finish_reason": None}
            usage = {"prompt_tokens": num_prompt_tokens, "completion_tokens": number + 1}
            if number == asked["max_tokens"] - 1:
                choice["finish_reason"] = "length"
            self._send(json.dumps({"id": "x", "object": "text_completion", "choices": [choice], "usage": usage}))
        self._send("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def say(words: str) -> None:
    sys.stdout.write(words + "\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--first-s", type=float, default=0.0)
    parser.add_argument("--gap-s", type=float, default=0.0)
    parser.add_argument("--stubborn", action="store_true", help="do not end when asked to")
    parser.add_argument(
        "--children", action="store_true", help="leave two children behind, one in a session of its own"
    )
    parser.add_argument("--dumb", action="store_true", help="never listen")
    parser.add_argument("--dead", action="store_true", help="say why, and end")
    arguments = parser.parse_args()
    if arguments.dead:
        say("no such model: gpt-5")
        sys.exit(3)
    sleeping = [
        sys.executable,
        "-c",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)",
    ]
    if arguments.children:
        for new_session in (False, True):
            child = subprocess.Popen(sleeping, start_new_session=new_session)
            say(f"child {child.pid}")
    if arguments.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.dumb:
        time.sleep(99)
    Handler.first_s, Handler.gap_s = arguments.first_s, arguments.gap_s
    say("listening")
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
