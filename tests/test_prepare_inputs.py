"""What `prepare` is given: tokenizers of every family, and all that can be wrong with files and words."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import DOCUMENTS, prepare, prepared, write_jsonl, write_parquet
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from factory_train.data import tokenizer as ours
from factory_train.data.manifest import DataManifest
from factory_train.data.shards import TokenStream

TEXT = "\n".join(DOCUMENTS)


def split_byte_level() -> Tokenizer:
    """A tokenizer as Llama 3 and Qwen have it: a pattern, then bytes; special tokens after a hole in the ids, and truncation left on."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken("<|begin_of_text|>", special=True), AddedToken("<|eot_id|>", special=True)])
    tokenizer.enable_truncation(16)
    return tokenizer


def metaspace() -> Tokenizer:
    """A tokenizer as Llama 2 and Mistral have it: spaces as a letter, bytes for what the vocabulary lacks."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("\u2581", "t", "h", "e", "\u2581t", "\u2581th", "\u2581the", "r", "n", "a", "d", "f"):
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("make", "eos"), [(split_byte_level, "<|eot_id|>"), (metaspace, "</s>")])
def test_tokens_are_those_of_transformers_for_any_fast_tokenizer(tmp_path: Path, make: Callable[[], Tokenizer], eos: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = save(make(), tmp_path / "hf", {"eos_token": {"content": eos}, "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token=eos)
    data = prepared(write_jsonl(tmp_path), f"tokenizer={folder}", cwd=tmp_path)
    manifest = DataManifest.load(data)
    assert manifest.tokenizer == "given"
    assert manifest.eos_id == theirs.eos_token_id
    assert manifest.vocab_size == max(theirs.get_vocab().values()) + 1
    assert (data / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    stream = TokenStream(data, "train")
    found = np.split(stream.slice(0, stream.num_tokens), stream.document_starts()[1:])
    by_number = {text.split()[0]: text for text in DOCUMENTS}
    for tokens in found[:200]:
        number = theirs.decode(tokens[:-1].tolist()).split()[0]
        # The characters of a special token are characters, also where transformers would take them for the token.
        expected = theirs(by_number[number], add_special_tokens=False, split_special_tokens=True).input_ids
        assert tokens.tolist() == [*expected, manifest.eos_id]


def test_bytes_of_the_tokens_of_other_families_add_up(tmp_path: Path) -> None:
    for make in (split_byte_level, metaspace):
        folder = save(make(), tmp_path / make.__name__)
        tokenizer = ours.Tokenizer.load(folder / "tokenizer.json", None)
        sizes = tokenizer.token_num_bytes()
        text = "the naïve 日本 end"
        added = 1 if make is metaspace else 0
        assert sum(sizes[token] for token in tokenizer.encode(text)) == len(text.encode()) + added
        assert [sizes[tokenizer.token_id(name) or 0] for name in tokenizer.special_tokens()] == [0] * len(tokenizer.special_tokens())


def test_a_long_text_is_not_cut_for_a_tokenizer_that_knows_where_texts_begin(tmp_path: Path) -> None:
    folder = save(metaspace(), tmp_path / "hf")
    text = "the end of the line\n" * 10_000
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(4)))
    data = prepared("a.jsonl", f"tokenizer={folder}", "validation_fraction=0.3", cwd=tmp_path)
    manifest, stream = DataManifest.load(data), TokenStream(data, "train")
    expected = len(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(f"0 {text}", add_special_tokens=False).ids)
    assert stream.document_starts()[1] == expected + 1
    assert manifest.eos_id == 2


@pytest.mark.parametrize(
    ("words", "eos"),
    [((), "</s>"), (("eos=<s>",), "<s>"), (("eos=none",), None)],
)
def test_end_of_text_is_a_usual_name_or_what_was_asked_for(tmp_path: Path, words: tuple[str, ...], eos: str | None) -> None:
    folder = save(metaspace(), tmp_path / "hf")
    data = prepared(write_jsonl(tmp_path), f"tokenizer={folder}", *words, cwd=tmp_path)
    manifest = DataManifest.load(data)
    names = {"<s>": 1, "</s>": 2, None: None}
    assert manifest.eos_id == names[eos]
    stream = TokenStream(data, "train")
    tokens = stream.slice(0, stream.num_tokens)
    assert int((tokens == 1).sum() + (tokens == 2).sum()) == (manifest.splits["train"].num_documents if eos else 0)


@pytest.mark.long
def test_a_run_on_a_users_tokenizer_generates_and_exports_with_its_end_of_text(tmp_path: Path) -> None:
    folder = save(split_byte_level(), tmp_path / "hf", {"eos_token": "<|eot_id|>"})
    data = prepared(write_jsonl(tmp_path), f"tokenizer={folder}", cwd=tmp_path)
    run = command.run("recipe=llama_ddp", f"data.path={data}", "run=x", *command.SMALL, "train.steps=4", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (export,) = (tmp_path / "runs").glob("*-x/export")
    config = json.loads((export / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|eot_id|>"
    assert json.loads((export / "config.json").read_text())["eos_token_id"] == DataManifest.load(data).eos_id
    for model in ("x", str(export)):
        text = command.run("generate", model, "", "tokens=4", cwd=tmp_path)
        assert text.returncode == 0, text.stderr


def row_of(value: Any) -> Callable[[Path], tuple[object, ...]]:
    """Returns what writes JSON lines whose third has something else in it."""

    def write(folder: Path) -> tuple[object, ...]:
        rows = [json.dumps({"text": f"row {number}"}) for number in range(5)]
        rows[2] = value if isinstance(value, str) else json.dumps(value)
        (folder / "a.jsonl").write_text("\n".join(rows) + "\n")
        return ("a.jsonl",)

    return write


def bytes_of(name: str, data: bytes) -> Callable[[Path], tuple[object, ...]]:
    def write(folder: Path) -> tuple[object, ...]:
        (folder / name).write_bytes(data)
        return (name,)

    return write


def mixed_encodings(folder: Path) -> tuple[object, ...]:
    (folder / "texts" / "inner").mkdir(parents=True)
    (folder / "texts" / "a.txt").write_text("fine\n" * 50)
    (folder / "texts" / "inner" / "b.txt").write_bytes("fine\nna\u00efve\n".encode("latin-1"))
    return ("texts",)


def nothing_but_empty_files(folder: Path) -> tuple[object, ...]:
    (folder / "texts" / "inner").mkdir(parents=True)
    (folder / "texts" / "inner" / "a.txt").touch()
    return ("texts",)


def only_other_endings(folder: Path) -> tuple[object, ...]:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"png")
    return ("pictures",)


def null_in_parquet(folder: Path) -> tuple[object, ...]:
    pq.write_table(pa.table({"text": ["a", None, "b"]}), folder / "a.parquet")
    return ("a.parquet",)


def numbers_in_parquet(folder: Path) -> tuple[object, ...]:
    pq.write_table(pa.table({"text": [1, 2]}), folder / "a.parquet")
    return ("a.parquet",)


def no_end_of_text(folder: Path) -> tuple[object, ...]:
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "<pad>": 2}, []))
    tokenizer.add_special_tokens(["<pad>"])
    return (write_jsonl(folder), f"tokenizer={save(tokenizer, folder / 'hf')}")


def cut_short(folder: Path) -> tuple[object, ...]:
    data = gzip.compress(json.dumps({"text": "a" * 1000}).encode())
    (folder / "a.jsonl.gz").write_bytes(data[:-12])
    return ("a.jsonl.gz",)


BAD: dict[str, tuple[Callable[[Path], tuple[object, ...]], str, str]] = {
    "wrong field": (
        lambda folder: (write_jsonl(folder), "field=body"),
        "corpus.jsonl:1: no field 'body'; the line has url, text",
        "field=",
    ),
    "no JSON": (row_of("{nonsense"), "a.jsonl:3: is not JSON", "on_error=skip"),
    "not an object": (row_of([1]), "a.jsonl:3: is a list, not an object", "on_error=skip"),
    "not a string": (row_of({"text": 3}), "a.jsonl:3: field 'text' is a number, not a string", "on_error=skip"),
    "null": (row_of({"text": None}), "a.jsonl:3: field 'text' is null, not a string", "on_error=skip"),
    "half a surrogate pair": (row_of('{"text": "\\ud800"}'), "a.jsonl:3: has half of a surrogate pair", "on_error=skip"),
    "mixed encodings": (mixed_encodings, "inner/b.txt:2: is not UTF-8: byte 0xef at offset 7", "iconv -f LATIN1"),
    "UTF-16": (bytes_of("a.txt", "text".encode("utf-16")), "a.txt:1: is binary, not text", "iconv -f UTF-16"),
    "empty file": (bytes_of("a.txt", b""), "a.txt: the file is empty", "leave it out"),
    "empty files only": (nothing_but_empty_files, "no file with text in texts", "prepare FILE"),
    "white space only": (bytes_of("a.jsonl", b'{"text": " "}\n\n'), "no document is left: 2 empty", "files with text"),
    "other endings": (only_other_endings, "1 of .png", "format=text"),
    "no such column": (
        lambda folder: (write_parquet(folder), "field=body"),
        "corpus.parquet: no column 'body'; it has text, id",
        "field=text",
    ),
    "null in parquet": (null_in_parquet, "a.parquet: row 1: column 'text' is null", "on_error=skip"),
    "numbers in parquet": (numbers_in_parquet, "column 'text' holds int64, not text", "field=NAME"),
    "no parquet": (bytes_of("a.parquet", b"text"), "a.parquet: is not a parquet file", "format=text"),
    "damaged parquet": (
        bytes_of("a.parquet", b"PAR1 and nothing else"),
        "a.parquet: is not a parquet file that can be read",
        "leave it out",
    ),
    "cut short": (cut_short, "a.jsonl.gz: cannot be read to its end", "write it again"),
    "not gzipped": (bytes_of("a.jsonl.gz", b"{}"), "is not gzipped", "mv "),
    "zstandard": (bytes_of("a.zst", b"x"), ".zst files are not unpacked here", "zstd -d"),
    "JSON": (bytes_of("a.json", b"[]"), "one JSON value, or one a line", "format=jsonl"),
    "no end of text": (no_end_of_text, "which token ends a document", "eos=TOKEN, or eos=none"),
    "unknown end of text": (
        lambda folder: (write_jsonl(folder), f"tokenizer={save(metaspace(), folder / 'hf')}", "eos=</S>"),
        "the tokenizer has no token '</S>'",
        "did you mean eos='</s>'?",
    ),
    "no tokenizer": (lambda folder: (write_jsonl(folder), "tokenizer=nowhere"), "tokenizer=nowhere: no tokenizer there", "bpe, byte"),
    "damaged tokenizer": (
        lambda folder: (write_jsonl(folder), bytes_of("t.json", b"{}")(folder) and "tokenizer=t.json"),
        "t.json: not a tokenizer",
        "save_pretrained",
    ),
    "no such file": (lambda folder: ("nowhere.txt",), "nowhere.txt: no such file or folder", "a path that exists"),
    "no match": (lambda folder: ("*.nothing",), "*.nothing: no file matches the pattern", "ls *.nothing"),
    "no words": (lambda folder: (), "which files?", "prepare FILE"),
    "unknown key": (lambda folder: (write_jsonl(folder), "feild=x"), "prepare does not take 'feild'", "did you mean field=x?"),
    "unknown format": (lambda folder: (write_jsonl(folder), "format=csv"), "'csv' is not one of auto, text, jsonl, parquet", "format=auto"),
    "no fraction": (
        lambda folder: (write_jsonl(folder), "validation_fraction=2"),
        "'2' is not between 0 and 1",
        "validation_fraction=0.05",
    ),
    "result inside": (lambda folder: (mixed_encodings(folder)[0], "out=texts/inner"), "", "out=FOLDER elsewhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_refused_with_its_place_and_what_to_do(tmp_path: Path, case: str) -> None:
    write, message, fix = BAD[case]
    words = [f"{word}" for word in write(tmp_path)]
    out = () if any(word.startswith("out=") for word in words) else ("out=out",) if words else ()
    done = prepare(*words, *out, *(() if not words or any("tokenizer=" in word for word in words) else ("tokenizer=byte",)), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert fix in done.stderr.split("  fix: ")[1]
    assert not (tmp_path / "out").exists()


def test_malformed_documents_are_skipped_and_counted_on_request(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in DOCUMENTS[:200]]
    rows[20:20] = ["{nonsense", "[]", json.dumps({"body": "x"}), json.dumps({"text": 1}), ""]
    (tmp_path / "a.jsonl").write_bytes("\n".join(rows).encode() + b'\n{"text": "na\xefve"}\n')
    done = prepare("a.jsonl", "tokenizer=byte", "on_error=skip", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    statistics = DataManifest.load(tmp_path / "out").statistics or {}
    assert statistics["documents"] == 200
    assert statistics["empty"] == 1
    assert statistics["skipped"] == {"no such field": 1, "not JSON": 1, "not UTF-8": 1, "not a string": 1, "not an object": 1}
    assert any("a.jsonl:21: is not JSON" in example for example in statistics["examples"])
    assert "skipped    1 not JSON" in done.stdout
    assert "a.jsonl:21: is not JSON" in done.stdout


def test_field_may_lie_inside_of_objects_and_structs(tmp_path: Path) -> None:
    rows = [{"meta": {"body": text}} for text in DOCUMENTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    ids = {}
    for name in ("a.jsonl", "a.parquet"):
        data = prepared(name, "field=meta.body", "tokenizer=byte", cwd=tmp_path, out=name + "-tokens")
        ids[name] = (DataManifest.load(data).statistics or {})["num_bytes"]
    assert set(ids.values()) == {sum(len(text.encode()) for text in DOCUMENTS)}


@pytest.mark.parametrize("name", ["a.jsonl", "folder"])
def test_data_that_is_to_be_prepared_first_says_so(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path).rename(tmp_path / "a.jsonl")
    done = command.run("recipe=llama_ddp", f"data.path={name}", cwd=tmp_path)
    assert done.returncode == 2
    assert f"python -m factory_train prepare {tmp_path / name}" in done.stderr
