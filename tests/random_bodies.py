"""Bodies for the endpoints that take one: mostly well formed, with extreme, wrong and hostile values among the rest."""

import json
import random
from typing import Any

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize")
LONG_TEXTS = ("a", " ", "\n", "1", "\u00e9", "\U0001f600", " the", "<|im_start|>", "\t x", "\u0000", "a\u0301")
MAX_BYTES = 8 << 20
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e-300, 1e300, -1e300, 2**31, 2**63 - 1, 2**64, -(2**63) - 1, 10**40),
    *("", "x", "none", "auto", "1", [], {}, [[]], [None], [1], ["a"], {"a": 1}, {"type": "text"}, [[1], [2]], ["a", 1]),
)
UNKNOWN = ("tools", "tool_choice", "functions", "function_call", "response_format", "best_of", "suffix", "user")
UNKNOWN += ("metadata", "store", "modalities", "guided_json", "x", "", "\u00fc", "self", "messages ", "extra_body")


class BodyMaker:
    """Makes (path, body) pairs from one seed. ``long_bytes`` bounds the longest texts."""

    def __init__(self, seed: int, vocab_size: int, long_bytes: int = 200_000) -> None:
        self._random = random.Random(seed)
        self._vocab_size = vocab_size
        self._long_bytes = long_bytes

    def make(self) -> tuple[str, bytes]:
        """Return the next path and body."""
        path = self._random.choice(PATHS)
        body = self._body(path)
        for _ in range(self._random.choice((0, 0, 0, 0, 0, 1, 2))):
            self._spoil(body)
        data = json.dumps(body, ensure_ascii=self._random.random() < 0.5).encode("utf-8", "surrogatepass")
        return path, self._spoiled(data)[:MAX_BYTES] if self._random.random() < 0.06 else data[:MAX_BYTES]

    def _body(self, path: str) -> dict[str, Any]:
        if path == "/detokenize":
            return {"tokens": self._token_ids()}
        if path == "/tokenize":
            asked = {"prompt": self._text()} if self._random.random() < 0.5 else {"messages": self._messages()}
            return asked | self._some(
                {"return_token_strs": self._bool, "add_special_tokens": self._bool, **self._chat()}
            )
        shared = self._some(self._sampling())
        shared["max_tokens"] = self._random.choice((1, 1, 2, 3, 4))
        if not shared.get("stream") and self._random.random() < 0.9:
            shared.pop("stream_options", None)
        if path == "/v1/completions":
            own = {
                "logprobs": lambda: self._random.randint(0, 20),
                "echo": self._bool,
                "add_special_tokens": self._bool,
            }
            return {"prompt": self._prompt()} | shared | self._some(own)
        if path == "/v1/responses":
            shared["max_output_tokens"] = shared.pop("max_tokens")
            for name in ("n", "stream_options"):
                shared.pop(name, None)
            own = {
                "instructions": self._text,
                "tools": lambda: [{"type": "function", "name": "f", "parameters": self._schema()}],
                "text": lambda: {"format": {"type": "json_schema", "name": "x", "schema": self._schema()}},
            }
            return {"input": self._text() if self._bool() else self._messages()} | shared | self._some(own)
        own = {"logprobs": self._bool, "top_logprobs": lambda: self._random.randint(0, 20), **self._chat()}
        return {"messages": self._messages()} | shared | self._some(own)

    def _some(self, fields: dict[str, Any]) -> dict[str, Any]:
        chance = self._random.choice((0.05, 0.2, 0.5))
        return {name: make() for name, make in fields.items() if self._random.random() < chance}

    def _sampling(self) -> dict[str, Any]:
        pick, number = self._random.choice, self._random.uniform
        return {
            "temperature": lambda: pick((0, 1e-300, 0.7, 1, 2, number(0, 2))),
            "top_p": lambda: pick((1e-300, 1e-9, 0.5, 1, number(0, 1))),
            "top_k": lambda: pick((-1, 0, 1, 5, 10**6, 2**31 - 1)),
            "min_p": lambda: pick((0, 1e-300, 0.5, 1)),
            "repetition_penalty": lambda: pick((1e-3, 0.5, 1, 1.1, 2, 100)),
            "presence_penalty": lambda: pick((-2, 0, 2)),
            "frequency_penalty": lambda: pick((-2, 0, 2)),
            "logit_bias": lambda: {str(self._token_id()): pick((-100, 100, 0.5)) for _ in range(pick((0, 1, 3, 300)))},
            "seed": lambda: pick((0, 1, -1, 2**63 - 1, -(2**63))),
            "n": lambda: pick((1, 1, 1, 2, 3, 8)),
            "stop": lambda: pick((self._text(), [self._text() for _ in range(pick((0, 1, 4, 16)))], "a" * 999 + "b")),
            "stop_token_ids": lambda: [self._token_id() for _ in range(pick((0, 1, 3, 256)))],
            "min_tokens": lambda: pick((0, 0, 1, 2)),
            "ignore_eos": self._bool,
            "skip_special_tokens": self._bool,
            "include_stop_str_in_output": self._bool,
            "stream": self._bool,
            "stream_options": lambda: {"include_usage": self._bool(), "include_obfuscation": self._bool()},
            "return_token_ids": self._bool,
            "priority": lambda: pick((0, -(2**31), 2**31 - 1)),
            "user": self._text,
            **self._constraints(),
        }

    def _constraints(self) -> dict[str, Any]:
        pick = self._random.choice
        return {
            "response_format": lambda: pick(({"type": "text"}, {"type": "json_object"}, {"type": "json_schema"})),
            "guided_json": self._schema,
            "guided_regex": lambda: pick(("[a-c]+", "(a|b", "(?=a)", "(a{1000}){1000}", self._text())),
            "structured_outputs": lambda: pick(({"choice": [self._text()]}, {"grammar": "start: start"}, {})),
            "allowed_token_ids": lambda: [self._token_id() for _ in range(pick((1, 3, 300)))],
            "bad_words": lambda: [self._text()[:1000] or "a" for _ in range(pick((0, 1, 3)))],
            "prompt_logprobs": lambda: pick((0, 1, 20)),
            "truncate_prompt_tokens": lambda: pick((-1, 1, 10, 2**31)),
        }

    def _schema(self) -> Any:
        properties = {self._text()[:20]: {"type": self._random.choice(("string", "integer", "strng", None))}}
        made = ({}, True, False, {"type": "object", "properties": properties}, {"$ref": "#"}, {"enum": [self._text()]})
        return self._random.choice((*made, {"items": {"pattern": self._text()}}, {"not": {}}, {"anyOf": [{}] * 300}))

    def _chat(self) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": "f"}}
        return {
            "tools": lambda: self._random.choice(
                (
                    None,
                    [],
                    [{"type": "function", "function": {"name": "f", "parameters": self._schema()}}],
                    [named] * 200,
                )
            ),
            "tool_choice": lambda: self._random.choice(("none", "auto", "required", named)),
            "parallel_tool_calls": self._bool,
            "add_generation_prompt": self._bool,
            "continue_final_message": self._bool,
            "chat_template": lambda: self._random.choice((None, "{{ 'a' * 10 ** 10 }}", "{{ messages }}")),
            "chat_template_kwargs": lambda: self._random.choice(
                (None, {}, {"messages": 1}, {"self": 1, "a b": [None]})
            ),
        }

    def _messages(self) -> list[Any]:
        count = self._random.choice((1, 1, 2, 3, 5, self._random.choice((1, 100, 5000))))
        roles = ("user", "assistant", "system", "developer", "tool", "", "\n")
        return [
            {"role": self._random.choice(roles), "content": self._content(count)} | self._extras() for _ in range(count)
        ]

    def _extras(self) -> dict[str, Any]:
        names = ("name", "refusal", "audio", "function_call", "tool_calls", "tool_call_id", "reasoning_content", "new")
        return {name: self._random.choice((*[None] * 8, "", [])) for name in names if self._random.random() < 0.1}

    def _content(self, num_messages: int) -> Any:
        if num_messages > 10:
            return self._random.choice(("", "a", None))
        kind = self._random.random()
        if kind < 0.7:
            return self._text()
        if kind < 0.8:
            return None
        return [{"type": "text", "text": self._text()} for _ in range(self._random.choice((0, 1, 3)))]

    def _prompt(self) -> Any:
        kind = self._random.random()
        if kind < 0.6:
            return self._text()
        if kind < 0.8:
            return self._token_ids()
        make = self._text if kind < 0.9 else self._token_ids
        return [make() for _ in range(self._random.choice((0, 1, 2, 3, 4)))]

    def _token_ids(self) -> list[int]:
        return [
            self._token_id() for _ in range(self._random.choice((0, 1, 3, 20, 60, self._random.choice((60, 3000)))))
        ]

    def _token_id(self) -> int:
        if self._random.random() < 0.002:
            return self._random.choice((self._vocab_size, 10**6, 2**31 - 1))
        return self._random.choice((0, 1, 2, self._vocab_size - 1, self._random.randrange(self._vocab_size)))

    def _text(self) -> str:
        kind = self._random.random()
        if kind < 0.6:
            return "".join(self._random.choice("aeinrst ,.\n\u00fc\u20ac") for _ in range(self._random.randrange(40)))
        if kind < 0.9:
            return "".join(chr(self._random.choice((0, 9, 10, 0xFF, 0x2028, 0xFFFD, 0x1F600, 0x301))) for _ in range(4))
        piece = self._random.choice(LONG_TEXTS)
        return piece * (self._random.choice((100, 1000, self._long_bytes)) // len(piece.encode()))

    def _bool(self) -> bool:
        return self._random.random() < 0.5

    def _spoil(self, body: dict[str, Any]) -> None:
        """Give one field, or one that is not known, a value that it may not have."""
        name = self._random.choice((*body, *UNKNOWN))
        body[name] = self._random.choice(WRONG)
        if isinstance(body.get("messages"), list) and body["messages"] and self._random.random() < 0.3:
            body["messages"][-1] = self._random.choice((*WRONG, {"role": "user"}, {"role": None, "content": 1}))

    def _spoiled(self, data: bytes) -> bytes:
        """Return bytes that are no JSON, or are deep, or too many."""
        at = self._random.randrange(len(data) + 1)
        inside = self._random.choice(
            (b"\xff", b"\x00", b"[" * 5000, b'"\\ud800"', b"1" * 5000, b"NaN", b'{"a":' * 5000)
        )
        return self._random.choice((data[:at], data[:at] + inside + data[at:], inside, b"", data + data))
