"""Prompts have exactly the length that is asked for, begin alike only where the workload says so, and are real text."""

import gzip
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from disagg.base.errors import ConfigurationError
from disagg.bench.client.prompt_source import load_prompt_source
from disagg.bench.client.prompt_texts import PromptMaker, Words, english_text, read_text
from disagg.measure.workload import PrefixBlocks
from disagg.models.tokenizer import Tokenizer
from openai_server import WordTokenizer

VOCABULARY = 1500


@cache
def trained_tokenizer(kind: str) -> Tokenizer:
    """A small tokenizer of the GPT-2 or of the SentencePiece family, trained on a part of the text."""
    backend = tokenizers.Tokenizer(models.BPE())
    if kind == "byte-level":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "byte-level" else []
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([english_text()[:100_000]], trainer)
    return Tokenizer(backend)


@cache
def words(kind: str) -> Words:
    return Words(english_text(), trained_tokenizer(kind))


def maker(kind: str, seed: int = 0) -> PromptMaker:
    return PromptMaker(words(kind), trained_tokenizer(kind).encode, seed=seed)


KINDS = st.sampled_from(["byte-level", "metaspace"])


@settings(deadline=None)
@given(kind=KINDS, prompt_len=st.integers(1, 700), key=st.text("abc", max_size=3))
def test_a_prompt_has_exactly_the_tokens_that_are_asked_for(kind: str, prompt_len: int, key: str) -> None:
    prompt = maker(kind).make(key, prompt_len)
    assert len(trained_tokenizer(kind).encode(prompt.text)) == prompt_len == prompt.num_tokens == len(prompt.token_ids)


@settings(deadline=None)  # the first example trains the tokenizer
@given(
    kind=KINDS,
    num_shared=st.integers(0, 4),
    own=st.lists(st.integers(100, 200), min_size=2, max_size=2, unique=True),
    block_tokens=st.integers(8, 64),
    rests=st.tuples(st.integers(1, 90), st.integers(1, 90)),
)
def test_prompts_share_the_tokens_of_their_equal_leading_blocks_and_hardly_more(
    kind: str, num_shared: int, own: list[int], block_tokens: int, rests: tuple[int, int]
) -> None:
    shared = tuple(range(num_shared))
    lengths = [(num_shared + 1) * block_tokens + rest for rest in rests]
    pair = [
        maker(kind).make(str(number), length, PrefixBlocks((*shared, number), block_tokens))
        for number, length in zip(own, lengths, strict=True)
    ]
    common = common_prefix(pair[0].token_ids, pair[1].token_ids)
    assert [prompt.num_tokens for prompt in pair] == lengths
    assert num_shared * block_tokens <= common < num_shared * block_tokens + 8


def test_prompts_without_a_prefix_begin_differently() -> None:
    made = [maker("byte-level").make(str(number), 64) for number in range(500)]
    assert len({tuple(prompt.token_ids[:12]) for prompt in made}) == 500


def test_equal_seeds_make_equal_prompts_and_others_do_not() -> None:
    assert maker("byte-level", 1).make("0", 50) == maker("byte-level", 1).make("0", 50)
    assert maker("byte-level", 1).make("0", 50).text != maker("byte-level", 2).make("0", 50).text
    blocks = PrefixBlocks((7, 8), 25)
    assert maker("byte-level", 1).make("0", 50, blocks).text != maker("byte-level", 2).make("0", 50, blocks).text


def test_a_block_that_is_filled_in_part_is_the_same_for_all_prompts_of_that_length() -> None:
    blocks = PrefixBlocks((7, 8), 40)
    first, second = (maker("byte-level").make(key, 60, blocks) for key in ("a", "b"))
    whole = maker("byte-level").make("c", 80, blocks)
    assert first.text == second.text
    assert common_prefix(first.token_ids, whole.token_ids) >= 50


def test_what_a_model_wants_around_a_prompt_counts() -> None:
    tokenizer = WordTokenizer()
    prompts = PromptMaker(Words(english_text(), tokenizer), tokenizer.encode)
    assert prompts.least_len == 2
    assert len(prompts.make("", 10).text.split()) == 9
    assert prompts.make("", 1).num_tokens == 2


def test_a_chat_template_that_only_the_server_knows_counts() -> None:
    tokenizer = WordTokenizer()
    prompts = PromptMaker(Words(english_text(), tokenizer), tokenizer.encode, extra_tokens=20)
    assert len(prompts.make("", 40).text.split()) == 19
    assert prompts.make("", 40).num_tokens == 40


def test_the_default_model_s_tokenizer_and_template_are_met_exactly(default_model: Path) -> None:
    source = load_prompt_source()
    assert source.encode_chat is not None
    for encode in (source.encode, source.encode_chat):
        prompts = PromptMaker(source.words, encode)
        assert [len(encode(prompts.make("", length).text)) for length in (64, 200, 1021)] == [64, 200, 1021]


@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_of_prompts_is_read_line_by_line(tmp_path: Path, zipped: bool) -> None:
    lines = "\n".join(json.dumps(row) for row in ({"prompt": "one two"}, {"turns": ["three", "four"]}))
    path = tmp_path / ("own.jsonl.gz" if zipped else "own.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if zipped else lines.encode())
    assert read_text(path) == "one two\nthree"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("own.csv", "", "neither .txt nor .jsonl"),
        ("own.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2"),
        ("own.jsonl", "[", "line 1"),
        ("absent.txt", None, "cannot read"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError, match=words):
        read_text(tmp_path / name)


def test_a_text_of_a_few_words_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="3 words are too few"):
        Words("far too few 1 2 3", WordTokenizer())


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next(
        (n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
