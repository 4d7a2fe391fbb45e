"""Tokenizers: exact round trips, fixed vocabularies, the same result every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from factory_train.data.tokenizer import END_OF_TEXT, Tokenizer, pieces
from factory_train.errors import DataError, IntegrityError

CORPUS = ["def f(x):\n    return x + 1\n\n\nclass A:\n\tpass\r\n" * 20, "The quick brown fox; naïve café, 日本語 🙂.\n" * 30]
# Valid text is all of Unicode but the surrogates, which UTF-8 cannot hold.
any_text = st.text(st.characters(exclude_categories=["Cs"]))


def trained(kind: str, vocab_size: int = 400) -> Tokenizer:
    return Tokenizer.train(kind, CORPUS, CORPUS, vocab_size)


BPE, BYTE, CHAR = (trained(kind) for kind in ("bpe", "byte", "char"))


@given(any_text)
@settings(max_examples=300, deadline=None)
def test_bpe_and_byte_give_back_any_text_exactly(text: str) -> None:
    for tokenizer in (BPE, BYTE):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_byte_ids_are_the_bytes_of_utf8() -> None:
    text = "a\0é🙂\r\n \x7f" + "".join(map(chr, range(0x100)))
    assert BYTE.encode(text) == list(text.encode())
    assert (BYTE.vocab_size, BYTE.eos_id) == (257, 256)


def test_bpe_vocabulary_is_at_most_what_was_asked_for() -> None:
    assert trained("bpe", 300).vocab_size == 300
    assert 257 < trained("bpe", 5000).vocab_size < 5000
    assert trained("bpe", 257).vocab_size == 257
    assert BPE.eos_id == 0


def test_char_vocabulary_is_the_characters_in_code_point_order_and_nothing_else() -> None:
    text = "b\na \t\r\u0301é🙂\u2028\u00a0\ufeff" + END_OF_TEXT
    tokenizer = Tokenizer.train("char", [], [text], 0)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.eos_id is None
    assert tokenizer.encode(text) == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_tokenizer_covers_characters_that_only_the_held_out_part_has() -> None:
    assert Tokenizer.train("char", ["ab"], ["ab", "c"], 0).encode("cab") == [2, 0, 1]


def test_character_outside_the_vocabulary_is_named() -> None:
    with pytest.raises(DataError, match="'ß'"):
        CHAR.encode("fußt")


@pytest.mark.parametrize("tokenizer", [BPE, BYTE])
def test_end_of_text_written_in_a_document_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{END_OF_TEXT}b")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


@pytest.mark.parametrize("tokenizer", [BPE, BYTE, CHAR])
def test_saved_tokenizer_loads_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json", tokenizer.eos_id)
    text = "class café:\n\treturn 🙂"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert loaded.token_num_bytes() == tokenizer.token_num_bytes()


def test_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError) as caught:
        Tokenizer.load(tmp_path / "tokenizer.json", None)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("tokenizer", [BPE, BYTE, CHAR])
def test_bytes_of_tokens_add_up_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    sizes, text = tokenizer.token_num_bytes(), CORPUS[1]
    assert sum(sizes[token] for token in tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.eos_id is None or sizes[tokenizer.eos_id] == 0


def test_a_character_cut_in_two_decodes_to_a_replacement_character() -> None:
    assert BYTE.decode(list("é".encode())[:1]) == "\ufffd"
    assert BPE.decode([]) == ""


def test_two_trainings_in_two_processes_are_identical() -> None:
    code = (
        "import hashlib, sys; from pathlib import Path; from factory_train.data.tokenizer import Tokenizer;"
        "import argparse, json.decoder, typing;"
        "texts = [Path(module.__file__).read_text() for module in (argparse, json.decoder, typing)];"
        "print(hashlib.sha256(Tokenizer.train('bpe', texts, texts, 1500).to_json().encode()).hexdigest())"
    )
    results = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(results) == 1


def test_text_in_pieces_gives_the_tokens_of_the_whole() -> None:
    text = "".join(CORPUS)[:600] + "x\n\n \n\n\n  x\n" * 20 + "end"
    whole = BPE.encode(text)
    for size in range(40, 80):
        cut = list(pieces(text, size))
        assert len(cut) > 5
        assert "".join(cut) == text
        assert [token for ids in BPE.encode_batch(cut) for token in ids] == whole


def test_a_line_without_end_is_cut_too() -> None:
    text = "é" * 1000
    assert "".join(pieces(text, size=64)) == text
    assert max(map(len, pieces(text, size=64))) <= 128
    assert list(pieces("")) == []


@pytest.mark.parametrize("tokenizer", [BPE, BYTE, CHAR])
def test_transformers_reads_it_and_agrees(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'factory_train[test]'")
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    text = "  def café (x) :\r\n\treturn 🙂 , x\n\n"
    assert theirs.encode(text) == tokenizer.encode(text)
    assert theirs.decode(theirs.encode(text)) == text
    assert len(theirs) == tokenizer.vocab_size
