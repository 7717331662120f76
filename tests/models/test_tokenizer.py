"""Text to ids and back, against transformers on the same files."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from gguf_writing import LLAMA_METADATA, write_gguf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from disagg.base.errors import ConfigurationError, InvalidRequestError, UnsupportedModelError
from disagg.models.locate import ModelFiles, ModelKind, locate_model
from disagg.models.tokenizer import IncrementalDecoder, Tokenizer, load_tokenizer

NO_TENSORS: dict[str, Any] = {}


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
def reference(default_model: ModelFiles) -> Any:
    """transformers' tokenizer of the default model.

    Of the GGUF metadata it heeds no pre-tokenizer called ``smollm``; the one in the model's own tokenizer.json cuts
    digits apart first, as llama.cpp does, and is put in here.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        reference = AutoTokenizer.from_pretrained(default_model.path.parent, gguf_file=default_model.path.name)
    reference.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return reference


class TestDefaultModel:
    def test_real_prompts(self, tokenizer: Tokenizer, reference: Any, real_prompts: dict[str, list[str]]) -> None:
        for texts in real_prompts.values():
            for text in texts:
                token_ids = tokenizer.encode(text)
                assert token_ids == reference(text)["input_ids"]
                assert tokenizer.decode(token_ids) == text

    @settings(deadline=None, max_examples=300)
    @given(st.text())
    def test_any_text(self, tokenizer: Tokenizer, reference: Any, text: str) -> None:
        assert tokenizer.encode(text) == reference(text)["input_ids"]

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 49_151)), st.booleans())
    def test_any_ids(self, tokenizer: Tokenizer, reference: Any, token_ids: list[int], skip: bool) -> None:
        assert tokenizer.decode(token_ids, skip) == reference.decode(token_ids, skip_special_tokens=skip)

    def test_special_tokens_in_text_are_recognised(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("<|im_start|>user") == [1, *tokenizer.encode("user")]

    def test_special_tokens_are_skipped_or_shown(self, tokenizer: Tokenizer) -> None:
        token_ids = tokenizer.encode("hi<|im_end|>")

        assert tokenizer.decode(token_ids) == "hi"
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == "hi<|im_end|>"

    def test_half_a_character_has_bytes_but_no_text(self, tokenizer: Tokenizer) -> None:
        pieces = tokenizer.encode("😀")

        assert b"".join(tokenizer.token_bytes(piece) for piece in pieces) == "😀".encode()
        assert "\ufffd" in tokenizer.token_text(pieces[0])

    def test_ids_beyond_the_vocabulary_are_empty(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.vocab_size == 49_152
        assert tokenizer.token_bytes(49_152) == b""

    def test_lone_surrogates_are_a_bad_request(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(InvalidRequestError, match="not valid Unicode"):
            tokenizer.encode("\ud800")


class TestIncrementalDecoding:
    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.integers(0, 49_151)), st.booleans())
    def test_pieces_add_up_to_the_whole(self, tokenizer: Tokenizer, token_ids: list[int], skip: bool) -> None:
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)

        pieces = [decoder.push(token_id) for token_id in token_ids]

        assert "".join(pieces) + decoder.flush() == tokenizer.decode(token_ids, skip)

    @settings(deadline=None)
    @given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
    def test_valid_text_never_shows_a_broken_character(self, tokenizer: Tokenizer, text: str) -> None:
        token_ids = tokenizer.encode(text)
        assume(tokenizer.decode(token_ids, skip_special_tokens=False) == text)  # a few bytes have no token
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=False)

        for token_id in token_ids:
            assert "\ufffd" not in decoder.push(token_id)
        assert decoder.flush() == ""

    def test_a_character_is_held_until_it_is_whole(self, tokenizer: Tokenizer) -> None:
        decoder = IncrementalDecoder(tokenizer)

        assert [decoder.push(token_id) for token_id in tokenizer.encode("a😀")] == ["a", "", "", "😀"]

    def test_a_character_cut_short_appears_at_the_end(self, tokenizer: Tokenizer) -> None:
        decoder = IncrementalDecoder(tokenizer)
        pushed = [decoder.push(token_id) for token_id in tokenizer.encode("a😀")[:-1]]

        assert (pushed, decoder.flush()) == (["a", "", ""], "\ufffd")

    def test_a_character_begun_in_the_prompt_is_finished(self, tokenizer: Tokenizer) -> None:
        *prompt, last = tokenizer.encode("a😀")

        assert IncrementalDecoder(tokenizer, prompt).push(last) == "😀"


class TestHuggingFaceFolder:
    def test_same_as_transformers(self, tiny_model: Any) -> None:
        folder = tiny_model("llama")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoTokenizer

            reference = AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(locate_model(str(folder)))

        assert tokenizer.encode("hello wörld") == reference("hello wörld")["input_ids"]
        assert tokenizer.special_tokens == {"bos_token": "<bos>", "eos_token": "<eos>"}

    def test_no_tokenizer_json(self, tmp_path: Path) -> None:
        files = ModelFiles(name="m", kind=ModelKind.HF_FOLDER, path=tmp_path)

        with pytest.raises(ConfigurationError, match=r"no tokenizer\.json"):
            load_tokenizer(files)

    def test_a_broken_tokenizer_json(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")

        with pytest.raises(ConfigurationError, match=r"tokenizer\.json"):
            load_tokenizer(ModelFiles(name="m", kind=ModelKind.HF_FOLDER, path=tmp_path))

    def test_an_unknown_decoder_is_named(self) -> None:
        backend = tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="a"))
        backend.decoder = decoders.WordPiece()

        with pytest.raises(ConfigurationError, match="WordPiece"):
            Tokenizer(backend)

    def test_truncation_and_padding_in_the_file_are_not_used(self) -> None:
        backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
        backend.decoder = decoders.ByteLevel()
        backend.enable_truncation(2)
        backend.enable_padding(length=8)

        assert Tokenizer(backend).encode("aaaa") == [0, 0, 0, 0]

    def test_an_added_token_outside_the_byte_alphabet_stands_for_itself(self) -> None:
        backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens([AddedToken("two words")])

        assert Tokenizer(backend).token_text(1) == "two words"


class TestGgufKinds:
    def build(self, tmp_path: Path, **tokens: Any) -> Tokenizer:
        metadata = LLAMA_METADATA | {f"tokenizer.ggml.{name}": value for name, value in tokens.items()}
        return load_tokenizer(locate_model(str(write_gguf(tmp_path / "m.gguf", "llama", metadata, NO_TENSORS))))

    def sentencepiece(self, tmp_path: Path, **changes: Any) -> Tokenizer:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        words = ["▁", "h", "i", "hi", "▁hi", "a", "▁a", "hia"]
        settings: dict[str, Any] = {
            "model": "llama",
            "tokens": pieces + words,
            "scores": [0.0] * 259 + [-9.0, -8.0, -7.0, -3.0, -1.0, -6.0, -4.0, -2.0],
            "token_type": [2, 3, 3, *[6] * 256, *[1] * 8],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "unknown_token_id": 0,
        }
        return self.build(tmp_path, **(settings | changes))

    def test_sentencepiece_merges_by_score(self, tmp_path: Path) -> None:
        tokenizer = self.sentencepiece(tmp_path)

        assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("hi hia")] == ["<s>", " hi", " hi", "a"]
        assert tokenizer.decode(tokenizer.encode("hi hia")) == "hi hia"

    def test_sentencepiece_falls_back_to_bytes(self, tmp_path: Path) -> None:
        tokenizer = self.sentencepiece(tmp_path)
        token_ids = tokenizer.encode("hi é😀a")
        decoder = IncrementalDecoder(tokenizer)

        pieces = [decoder.push(token_id) for token_id in token_ids]

        assert "".join(pieces) == tokenizer.decode(token_ids) == "hi é😀a"
        assert pieces[-6:] == ["é", "", "", "", "😀", "a"]

    def test_only_the_first_word_of_a_text_loses_its_space(self, tmp_path: Path) -> None:
        """An answer goes on from its prompt: there the space belongs to the text."""
        tokenizer = self.sentencepiece(tmp_path)
        (word,) = tokenizer.encode("hi", add_special_tokens=False)

        assert IncrementalDecoder(tokenizer).push(word) == "hi"
        assert IncrementalDecoder(tokenizer, prompt_token_ids=[1, word]).push(word) == " hi"

    def test_flags_decide_over_begin_and_end(self, tmp_path: Path) -> None:
        tokenizer = self.sentencepiece(tmp_path, add_bos_token=False, add_eos_token=True)

        assert tokenizer.encode("hi")[1:] == [2]

    def byte_level(self, tmp_path: Path, pre: str, **changes: Any) -> Tokenizer:
        letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
        merges = ["1 2", "12 3", "123 4", "Ġ Ġ", "h i"]
        tokens = [*letters, *(merge.replace(" ", "") for merge in merges), "<s>"]
        settings: dict[str, Any] = {
            "model": "gpt2",
            "pre": pre,
            "tokens": tokens,
            "merges": merges,
            "token_type": [1] * (len(tokens) - 1) + [3],
            "bos_token_id": len(tokens) - 1,
        }
        return self.build(tmp_path, **(settings | changes))

    @pytest.mark.parametrize(
        ("pre", "pieces"),
        [
            ("smollm", ["1", "2", "3", "4"]),
            ("qwen2", ["1", "2", "3", "4"]),
            ("llama-bpe", ["<s>", "123", "4"]),
            ("gpt-2", ["1234"]),
            ("default", ["1234"]),
        ],
    )
    def test_pre_tokenizers_differ_in_digits(self, tmp_path: Path, pre: str, pieces: list[str]) -> None:
        tokenizer = self.byte_level(tmp_path, pre)

        assert [tokenizer.token_text(token_id) for token_id in tokenizer.encode("1234")] == pieces

    @pytest.mark.parametrize("merge", ["12", "1 \u00e9", "1 9", "", " 1", "1 2 3"])
    def test_a_merge_that_joins_no_tokens_is_named(self, tmp_path: Path, merge: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"m\.gguf: 'tokenizer\.ggml\.merges' holds '{merge}'"):
            self.byte_level(tmp_path, "gpt-2", merges=["1 2", merge])

    @pytest.mark.parametrize("role", ["unknown", "bos"])
    def test_a_special_id_outside_the_vocabulary_is_named(self, tmp_path: Path, role: str) -> None:
        for build in (self.sentencepiece, lambda path, **ids: self.byte_level(path, "gpt-2", **ids)):
            with pytest.raises(ConfigurationError, match=rf"'tokenizer\.ggml\.{role}_token_id' should be below .* 320"):
                build(tmp_path, **{f"{role}_token_id": 320})

    def test_tokens_that_are_spelled_alike_are_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"tokens' holds 'hi' twice, as 0 and as 2"):
            self.byte_level(tmp_path, "gpt-2", tokens=["hi", "a", "hi"], token_type=[1, 1, 1])

    @pytest.mark.parametrize(
        "changes", [{"scores": [1.0]}, {"scores": "none"}, {"token_type": [1]}, {"tokens": 3}, {"tokens": []}]
    )
    def test_what_is_broken_is_a_fault_of_the_configuration(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError, match=r"m\.gguf"):
            self.sentencepiece(tmp_path, **changes)

    def test_an_unknown_pre_tokenizer_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"'made-up'.*'llama-bpe'"):
            self.byte_level(tmp_path, "made-up")

    def test_an_unknown_kind_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"'bert'.*'gpt2'"):
            self.build(tmp_path, model="bert")

    def test_a_file_without_vocabulary(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"tokenizer\.ggml\.tokens|tokenizer\.ggml\.merges"):
            self.build(tmp_path, model="gpt2", pre="qwen2")
