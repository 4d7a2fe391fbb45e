"""Prepared data: whole or not there, made once, checked before use, and enough of it copied into a run."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from factory_train import storage
from factory_train.config import Config, DataConfig
from factory_train.data import manifest as manifest_module
from factory_train.data.baselines import baselines
from factory_train.data.catalog import cache_root, find_prepared
from factory_train.data.manifest import DataManifest, check_length, check_vocabulary
from factory_train.data.prepare import copy_for_run, prepare
from factory_train.data.shards import ShardWriter, TokenStream, token_dtype
from factory_train.data.source import read_source
from factory_train.data.tokenizer import Tokenizer
from factory_train.errors import ConfigError, DataError, IntegrityError, PreflightError

SENTENCES = ["the cat sat on the mat.\n", "a dog; naïve, 日本 🙂!\n", "def f(x):\n    return x\n"]
TEXT = "".join(SENTENCES[(number * number // 3) % 3] + str(number) for number in range(400))


def quiet(line: str) -> None:
    pass


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return DataConfig(path=str(file), vocab_size=300, validation_fraction=0.1)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def in_child(config: DataConfig, cache: Path, report: str) -> subprocess.Popen[str]:
    """Prepares in another process; `report` is the body of the function called with each line."""
    code = (
        "import os, signal\nfrom pathlib import Path\nfrom factory_train.config import DataConfig\n"
        "from factory_train.data.prepare import prepare\n"
        f"def report(line):\n    {report}\n"
        f"print(prepare(DataConfig(**{dataclasses.asdict(config)!r}), Path({str(cache)!r}), report))\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("tokenizer", ["bpe", "byte", "char"])
@pytest.mark.parametrize("shard_tokens", [10**9, 100])
def test_shards_decode_to_the_text(config: DataConfig, cache: Path, tokenizer: str, shard_tokens: int) -> None:
    config.tokenizer = tokenizer
    folder = prepare(config, cache, quiet, shard_tokens=shard_tokens)
    manifest = DataManifest.load(folder)
    loaded = Tokenizer.load(folder / "tokenizer.json", manifest.eos_id)
    for split, documents in read_source(config).splits.items():
        stream = TokenStream(folder, split)
        tokens = stream.slice(0, stream.num_tokens)
        assert loaded.decode(tokens.tolist()) == documents[0].text
        record = manifest.splits[split]
        assert (record.num_tokens, record.num_bytes) == (len(tokens), len(documents[0].text.encode()))
        assert len(record.shards) == -(-len(tokens) // shard_tokens)
    assert manifest.vocab_size == loaded.vocab_size
    assert manifest.eos_id == loaded.eos_id
    assert 0 < manifest.baselines["bigram_kneser_ney"] < manifest.baselines["unigram"] < np.log(manifest.vocab_size)


def test_builtin_corpus_is_prepared_with_documents_separated_by_end_of_text(cache: Path) -> None:
    config = DataConfig(tokenizer="byte")
    folder = prepare(config, cache, quiet)
    manifest, documents = DataManifest.load(folder), read_source(config).splits["validation"]
    stream = TokenStream(folder, "validation")
    tokens, starts = stream.slice(0, stream.num_tokens), stream.document_starts()
    assert len(starts) == len(documents) == manifest.splits["validation"].num_documents
    assert manifest.eos_id is not None
    assert np.flatnonzero(tokens == manifest.eos_id).tolist() == (starts[1:] - 1).tolist()
    for document, text in zip(documents[:3], np.split(tokens, starts[1:]), strict=False):
        assert bytes(text[text != manifest.eos_id].tolist()).decode() == document.text
    assert find_prepared(config, cache) == folder


def test_second_preparation_reuses_the_first(config: DataConfig, cache: Path) -> None:
    assert find_prepared(config, cache) is None
    folder = prepare(config, cache, quiet)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert find_prepared(config, cache) == folder
    lines: list[str] = []
    assert prepare(config, cache, lines.append) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert "was prepared before" in lines[-1]


def test_same_bytes_elsewhere_are_the_same_dataset(config: DataConfig, cache: Path, tmp_path: Path) -> None:
    folder = prepare(config, cache, quiet)
    (tmp_path / "copy").mkdir()
    copied = dataclasses.replace(config, path=shutil.copy(str(config.path), tmp_path / "copy" / "text.txt"))
    assert find_prepared(copied, cache) is None
    assert prepare(copied, cache, quiet) == folder
    assert find_prepared(copied, cache) == folder


def test_whatever_changes_tokens_changes_the_dataset(config: DataConfig, cache: Path) -> None:
    folders = {prepare(config, cache, quiet)}
    changes = ({"tokenizer": "byte"}, {"tokenizer": "char"}, {"vocab_size": 310}, {"validation_fraction": 0.2})
    for change in changes:
        changed = dataclasses.replace(config, **change)
        assert find_prepared(changed, cache) is None
        folders.add(prepare(changed, cache, quiet))
    Path(str(config.path)).write_text(TEXT + "more")
    assert find_prepared(config, cache) is None
    folders.add(prepare(config, cache, quiet))
    assert len(folders) == 6


def test_two_processes_at_once_make_one_dataset(config: DataConfig, cache: Path) -> None:
    # Both report having read the text before either may go on, so that they reach the lock together.
    gate = cache.parent / "gate"
    gate.mkdir()
    wait = (
        f"import time; line.startswith('data: text.txt') and (Path({str(gate)!r}, str(os.getpid())).touch(),"
        f" [time.sleep(0.01) for _ in iter(lambda: len(os.listdir({str(gate)!r})), 2)]); line.endswith('tokenizer') and print('built')"
    )
    children = [in_child(config, cache, wait) for _ in range(2)]
    results = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    outputs = [stdout.split() for stdout, _ in results]
    assert outputs[0][-1] == outputs[1][-1]
    assert sum(words.count("built") for words in outputs) == 1
    assert len(os.listdir(cache / "datasets")) == 1


@pytest.mark.parametrize("stage", ["making the", "encoding", "counting", "is ready"])
def test_process_killed_midway_leaves_nothing_that_passes_for_data(config: DataConfig, cache: Path, stage: str) -> None:
    child = in_child(config, cache, f"{stage!r} in line and os.kill(os.getpid(), signal.SIGKILL)")
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(cache / "datasets") if not name.startswith(".")] == []
    assert find_prepared(config, cache) is None
    folder = prepare(config, cache, quiet)
    assert os.listdir(cache / "datasets") == [folder.name]
    TokenStream(folder, "train").verify()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: list[Callable[[Path], None]] = [truncate, Path.unlink, flip]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["train-00001.bin", "validation-00000.bin", "train-documents.bin", "tokenizer.json"])
def test_damaged_file_is_named_and_prepared_again(config: DataConfig, cache: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = prepare(config, cache, quiet, shard_tokens=1000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder / name)
    with pytest.raises(IntegrityError) as caught:
        TokenStream(folder, "validation" if name.startswith("val") else "train").verify()
    assert name in str(caught.value)
    # A changed size is seen without reading; a changed byte when the prepare stage reads.
    assert (find_prepared(config, cache) is None) == (damage is not flip)
    lines: list[str] = []
    assert prepare(config, cache, lines.append, shard_tokens=1000) == folder
    assert any(name in line and "preparing again" in line for line in lines)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(cache / "datasets") == [folder.name]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format_version": 1}'])
def test_damaged_manifest_is_named_and_prepared_again(config: DataConfig, cache: Path, content: str) -> None:
    folder = prepare(config, cache, quiet)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(IntegrityError, match="manifest"):
        DataManifest.load(folder)
    assert find_prepared(config, cache) is None
    assert DataManifest.load(prepare(config, cache, quiet)).id == folder.name


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": "elsewhere"}'])
def test_damaged_alias_is_no_answer(config: DataConfig, cache: Path, content: str) -> None:
    prepare(config, cache, quiet)
    (alias,) = (cache / "requests").iterdir()
    alias.write_text(content)
    assert find_prepared(config, cache) is None


def test_full_disk_is_refused_with_nothing_left_behind(config: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "append", no_space)
    with pytest.raises(PreflightError, match="No space left") as caught:
        prepare(config, cache, quiet)
    assert str(cache) in str(caught.value)
    assert "data.cache_dir=" in str(caught.value.fix)
    assert os.listdir(cache / "datasets") == []


def test_cache_below_a_file_is_refused(config: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PreflightError, match="Not a directory"):
        prepare(config, tmp_path / "file" / "cache", quiet)


def test_binary_text_is_refused_by_the_preparation_too(config: DataConfig, cache: Path) -> None:
    Path(str(config.path)).write_bytes(b"text\0text")
    with pytest.raises(DataError, match="NUL byte at offset 4"):
        prepare(config, cache, quiet)
    assert not cache.exists()


def test_text_too_short_to_have_targets_is_refused(config: DataConfig, cache: Path) -> None:
    Path(str(config.path)).write_text("ab")
    with pytest.raises(DataError, match="context is longer than the data"):
        prepare(config, cache, quiet)
    assert find_prepared(config, cache) is None


def test_length_is_checked_against_the_tokens_of_both_splits(config: DataConfig, cache: Path) -> None:
    manifest = DataManifest.load(prepare(config, cache, quiet))
    have = manifest.splits["validation"].num_tokens
    check_length(manifest, have - 1)
    with pytest.raises(DataError, match="validation part has") as caught:
        check_length(manifest, have)
    assert f"train.seq_len={have - 1}" in str(caught.value.fix)


def test_model_vocabulary_must_hold_the_tokenizers(config: DataConfig, cache: Path) -> None:
    manifest = DataManifest.load(prepare(config, cache, quiet))
    for enough in (None, 300, 50000):
        check_vocabulary(manifest, enough)
    with pytest.raises(ConfigError, match="299 embeddings") as caught:
        check_vocabulary(manifest, 299)
    assert "model.vocab_size=300" in str(caught.value.fix)


def test_run_copy_is_enough_for_evaluation(config: DataConfig, cache: Path, tmp_path: Path) -> None:
    folder = prepare(config, cache, quiet)
    whole, train = TokenStream(folder, "validation"), TokenStream(folder, "train")
    expected = whole.slice(0, 101)
    figures = baselines(train.slice(0, train.num_tokens), expected, train.manifest.vocab_size)
    copy = copy_for_run(folder, tmp_path / "data", 101)
    moved = (tmp_path / "data").rename(tmp_path / "elsewhere")
    shutil.rmtree(cache)

    assert sorted(os.listdir(moved)) == ["manifest.json", "tokenizer.json", "validation-documents.bin", "validation.bin"]
    stream, tokenizer = TokenStream(moved, "validation"), Tokenizer.load(moved / "tokenizer.json", copy.eos_id)
    stream.verify()
    assert stream.slice(0, stream.num_tokens).tolist() == expected.tolist()
    assert stream.document_starts().tolist() == [0]
    assert stream.manifest == copy
    # Cut between whole characters or not, the bytes are those of these tokens, and bits per byte follow.
    sizes = tokenizer.token_num_bytes()
    assert copy.splits["validation"].num_bytes == sum(sizes[token] for token in expected)
    assert copy.bits_per_byte(np.log(2)) == pytest.approx(101 / copy.splits["validation"].num_bytes)
    assert copy.baselines == pytest.approx(figures)
    with pytest.raises(IntegrityError, match=r"train-00000\.bin"):
        TokenStream(moved, "train")


def test_run_copy_of_the_whole_split_has_its_figures(config: DataConfig, cache: Path, tmp_path: Path) -> None:
    folder = prepare(config, cache, quiet)
    copy, manifest = copy_for_run(folder, tmp_path / "data", 10**9), DataManifest.load(folder)
    assert copy.baselines == manifest.baselines
    for name in ("num_tokens", "num_bytes", "num_documents"):
        assert getattr(copy.splits["validation"], name) == getattr(manifest.splits["validation"], name)


def test_run_copy_is_repeated_for_the_same_data_and_refused_for_other(config: DataConfig, cache: Path, tmp_path: Path) -> None:
    folder, run_data = prepare(config, cache, quiet), tmp_path / "data"
    first = copy_for_run(folder, run_data, 50)
    assert copy_for_run(folder, run_data, 50) == first
    other = prepare(dataclasses.replace(config, tokenizer="byte"), cache, quiet)
    with pytest.raises(DataError, match="the run was started on"):
        copy_for_run(other, run_data, 50)
    assert DataManifest.load(run_data) == first


def test_slices_cross_shard_borders(tmp_path: Path, config: DataConfig, cache: Path) -> None:
    folder = prepare(config, cache, quiet, shard_tokens=7)
    stream = TokenStream(folder, "validation")
    whole = stream.slice(0, stream.num_tokens)
    assert whole.dtype == np.int64
    for start in range(0, 30):
        for length in (0, 1, 6, 7, 8, 20):
            assert stream.slice(start, length).tolist() == whole[start : start + length].tolist()
    assert stream.slice(len(stream), 0).tolist() == []
    for start, length in ((-1, 2), (0, len(stream) + 1), (len(stream), 1)):
        with pytest.raises(IndexError):
            stream.slice(start, length)


def test_tokens_are_stored_in_the_narrowest_type_that_holds_them(tmp_path: Path) -> None:
    assert [token_dtype(size) for size in (257, 65535, 65537, 128256)] == ["uint16", "uint16", "uint32", "uint32"]
    writer = ShardWriter(tmp_path, "train", "uint32")
    writer.begin_document()
    writer.append([1, 100_000])
    shards, _ = writer.close()
    assert (tmp_path / shards[0].name).read_bytes() == b"\x01\0\0\0\xa0\x86\x01\0"


def test_manifest_round_trips_and_refuses_a_newer_format(config: DataConfig, cache: Path) -> None:
    manifest = DataManifest.load(prepare(config, cache, quiet))
    assert DataManifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(ConfigError, match="newer than this version reads"):
        DataManifest.from_json({**manifest.to_json(), "format_version": manifest_module.FORMAT_VERSION + 1})


def test_manifest_of_format_1_is_read(tmp_path: Path) -> None:
    # As the first version wrote it; whatever later versions change, this stays readable.
    file = {"name": "x", "num_bytes": 4, "sha256": "00"}
    split = {"num_tokens": 2, "num_bytes": 5, "num_documents": 1, "shards": [file], "documents": file}
    old = {
        "format_version": 1,
        "id": "abc",
        "kind": "text",
        "description": "a.txt",
        "tokenizer": "char",
        "vocab_size": 65,
        "eos_id": None,
        "dtype": "uint16",
        "tokenizer_file": file,
        "source_file": file,
        "splits": {"train": split, "validation": split},
        "baselines": {"unigram": 3.3, "bigram_kneser_ney": 2.5},
    }
    storage.write_json(tmp_path / "manifest.json", old)
    manifest = DataManifest.load(tmp_path)
    assert manifest.bytes_per_token == 2.5
    assert manifest.to_json() == old


def test_cache_is_below_the_runs_unless_told_otherwise(tmp_path: Path) -> None:
    config = Config()
    assert cache_root(config, tmp_path) == tmp_path / ".data"
    config.data.cache_dir = str(tmp_path / "shared")
    assert cache_root(config, tmp_path / "runs") == tmp_path / "shared"
