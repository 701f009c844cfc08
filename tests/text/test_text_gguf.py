"""Vocabularies of GGUF files, written here with the `gguf` library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import pre_tokenizers

from millicent.core.errors import ModelError
from millicent.text import load_tokenizer
from millicent.text.gguf import read_gguf_head

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTE_PAIR_TEXTS = ["<|start|>", "<|end|>", "<tool>", *LETTERS, "12", "123", "1234", "ab"]


def write(path: Path, change: Callable[[gguf.GGUFWriter], None]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(99)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_pairs(pre: str, kind: str = "gpt2") -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(BYTE_PAIR_TEXTS)
        writer.add_token_types([3, 3, 4, *[1] * (len(BYTE_PAIR_TEXTS) - 3)])
        writer.add_token_merges(["1 2", "12 3", "123 4", "a b"])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    return add


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["ab", "1234"]),
        ("smollm", ["ab", "1", "2", "3", "4"]),
        ("qwen2", ["ab", "1", "2", "3", "4"]),
        ("llama-bpe", ["<|start|>", "ab", "123", "4"]),
    ],
)
def test_numbers_are_cut_as_each_pre_tokenizer_does(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", byte_pairs(pre)))
    assert [BYTE_PAIR_TEXTS[token] for token in tokenizer.encode("ab1234")] == words


def test_control_tokens_in_text_are_text_but_user_defined_ones_are_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", byte_pairs("gpt-2")))
    tokens = tokenizer.encode("<|end|><tool>")
    assert 1 not in tokens
    assert tokens[-1] == 2
    assert tokenizer.decode(tokens) == "<|end|><tool>"
    assert tokenizer.eos_tokens == {1}
    assert tokenizer.context_tokens == 99


def test_sentence_pieces_merge_by_score_and_fall_back_to_bytes(tmp_path: Path) -> None:
    texts = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    texts += ["\u2581", "a", "b", "c", "ab", "bc", "\u2581a"]
    scores = [0.0] * 259 + [-5.0, -6.0, -7.0, -8.0, -2.0, -1.0, -3.0]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(texts)
        writer.add_token_scores(scores)
        writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 7])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", add))
    assert [texts[token] for token in tokenizer.encode("abc")] == ["<s>", "\u2581a", "bc"]
    assert [texts[token] for token in tokenizer.encode("\u00e9")] == ["<s>", "\u2581", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("abc \u00e9")) == " abc \u00e9"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (byte_pairs("gpt-2", "t5"), "'t5' is not supported .supported: gpt2, llama."),
        (byte_pairs("unheard-of"), "'unheard-of' is not supported"),
        (lambda writer: writer.add_tokenizer_model("gpt2"), "holds no tokenizer"),
    ],
)
def test_a_vocabulary_we_cannot_read_is_refused_with_those_we_can(
    tmp_path: Path, change: Callable[[gguf.GGUFWriter], None], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        load_tokenizer(write(tmp_path / "m.gguf", change))


def test_metadata_is_read_as_the_gguf_library_reads_it(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_bool("a.bool", True)
        writer.add_int64("a.int64", -(2**40))
        writer.add_float32("a.float32", 0.5)
        writer.add_string("a.string", "\u00e9")
        writer.add_array("a.numbers", [1, 2, 3])
        writer.add_array("a.strings", ["x", "", "y"])

    path = write(tmp_path / "m.gguf", add)
    head = read_gguf_head(path)
    for key, field in gguf.GGUFReader(path).fields.items():
        if not key.startswith("GGUF."):
            assert head.metadata[key] == field.contents()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"nothing like it", b"GGUF\x03\x00\x00\x00" + b"\xff" * 16])
def test_what_is_no_gguf_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.gguf: not a whole GGUF file"):
        load_tokenizer(tmp_path / "m.gguf")
