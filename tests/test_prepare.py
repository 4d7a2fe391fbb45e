"""`prepare`: text of every format to the same tokens, whoever interrupts it and however many processes there are."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import command
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from factory_train.data.manifest import DataManifest
from factory_train.data.shards import TokenStream
from factory_train.data.tokenizer import Tokenizer

SEED = 7


def texts(count: int, words: int = 60) -> list[str]:
    """Returns documents that all differ, of all lengths, some with line ends and characters of several bytes."""
    source = random.Random(SEED)
    some = ["def", "return", "naïve", "日本語", "🙂", "x = 1\n", "\n\n", "the", "of", "and", "<|endoftext|>", "\ttab", "'quoted'"]
    return [f"{number} " + " ".join(source.choices(some, k=source.randrange(1, words))) for number in range(count)]


DOCUMENTS = texts(600)


def write_jsonl(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"url": "x", "text": text}, ensure_ascii=False) + "\n" for text in DOCUMENTS))
    return path


def write_gzipped(folder: Path) -> Path:
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS).encode()))
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "corpus.parquet"
    pq.write_table(pa.table({"text": DOCUMENTS, "id": list(range(len(DOCUMENTS)))}), path, row_group_size=64)
    return path


def write_files(folder: Path) -> Path:
    path = folder / "corpus"
    for number, text in enumerate(DOCUMENTS):
        file = path / f"part{number % 7}" / f"{number:04d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return path


def prepare(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return command.run("prepare", *map(str, words), cwd=cwd)


def prepared(*words: object, cwd: Path, out: str = "out") -> Path:
    done = prepare(*words, f"out={out}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / out


def documents(folder: Path, split: str) -> list[str]:
    """Returns the documents of a split, each checked to end with the end-of-text and to hold no other."""
    manifest, stream = DataManifest.load(folder), TokenStream(folder, split)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", manifest.eos_id)
    found = []
    for tokens in np.split(stream.slice(0, stream.num_tokens), stream.document_starts()[1:]):
        assert np.flatnonzero(tokens == manifest.eos_id).tolist() == [len(tokens) - 1]
        found.append(tokenizer.decode(tokens.tolist()))
    return found


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("write", [write_jsonl, write_gzipped, write_parquet, write_files])
def test_every_document_becomes_tokens_once_and_its_boundary_is_kept(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    folder = prepared(write(tmp_path), "vocab_size=300", cwd=tmp_path)
    train, validation = documents(folder, "train"), documents(folder, "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert len(set(train) & set(validation)) == 0
    assert 10 <= len(validation) <= 60
    # Of one file, the order is the file's: nothing is shuffled before training, which shuffles rows.
    assert [int(text.split()[0]) for text in train] == sorted(int(text.split()[0]) for text in train) or write is write_files
    statistics = DataManifest.load(folder).statistics
    assert statistics is not None
    assert statistics["documents"] == len(DOCUMENTS)
    assert statistics["num_bytes"] == sum(len(text.encode()) for text in DOCUMENTS)
    assert statistics["tokens"] == sum(split.num_tokens for split in DataManifest.load(folder).splits.values())
    assert sum(statistics["lengths"].values()) == len(train)
    stream = TokenStream(folder, "train")
    lengths = np.diff([*stream.document_starts(), stream.num_tokens])
    assert statistics["longest"] == lengths.max()
    assert statistics["lengths"] == {
        str(k): int(((lengths >= 2**k) & (lengths < 2 ** (k + 1))).sum()) for k in sorted({int(n).bit_length() - 1 for n in lengths})
    }


def test_lines_of_a_text_file_can_be_documents(tmp_path: Path) -> None:
    lines = [f"line {number} of the file" for number in range(300)]
    (tmp_path / "lines.txt").write_text("\r\n".join(lines) + "\n\n")
    folder = prepared("lines.txt", "document=line", "tokenizer=byte", cwd=tmp_path)
    assert sorted(documents(folder, "train") + documents(folder, "validation")) == sorted(lines)
    assert (DataManifest.load(folder).statistics or {})["empty"] == 1


def test_of_few_text_files_the_tail_of_each_is_held_out(tmp_path: Path) -> None:
    halves = {"a.txt": "first file\n" * 400, "b.md": "second file\n" * 400}
    for name, text in halves.items():
        (tmp_path / name).write_text(text)
    folder = prepared("a.txt", "b.md", "tokenizer=byte", "validation_fraction=0.1", cwd=tmp_path)
    train, validation = documents(folder, "train"), documents(folder, "validation")
    for text in halves.values():
        head = next(part for part in train if text.startswith(part))
        tail = next(part for part in validation if text.endswith(part))
        assert head + tail == text
        assert len(tail) == pytest.approx(len(text) / 10, abs=20)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + b"some text\n" * 100)
    folder = prepared("a.txt", "tokenizer=byte", cwd=tmp_path)
    assert documents(folder, "train")[0].startswith("some text")


def test_shards_do_not_depend_on_the_number_of_processes_nor_on_where_the_corpus_lies(tmp_path: Path) -> None:
    path = write_files(tmp_path)
    one = prepared(path, "vocab_size=300", "workers=1", cwd=tmp_path, out="one")
    (tmp_path / "elsewhere").mkdir()
    path = path.rename(tmp_path / "elsewhere" / "moved")
    three = prepared(path, "vocab_size=300", "workers=3", cwd=tmp_path, out="three")
    names = {path.name for path in one.iterdir()} - {"manifest.json", "source.json"}
    assert {path.name for path in three.iterdir()} - {"manifest.json", "source.json"} == names
    for name in names:
        assert (one / name).read_bytes() == (three / name).read_bytes(), name
    assert DataManifest.load(one).id == DataManifest.load(three).id


def test_any_first_part_of_the_validation_split_is_a_sample_of_the_whole_corpus(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {number}"}) + "\n" for number in range(2000)))
    folder = prepared("a.jsonl", "b.jsonl", "c.jsonl", "tokenizer=byte", cwd=tmp_path)
    first = documents(folder, "validation")[:90]
    counts = [sum(text.startswith(name) for text in first) for name in "abc"]
    assert min(counts) >= 15, counts


def large_corpus(folder: Path) -> Path:
    """Writes about 24 MB: some twenty chunks."""
    path, many = folder / "large.jsonl", texts(3000, 400)
    with path.open("w") as file:
        for number in range(6):
            file.writelines(json.dumps({"text": f"{number} {text}"}) + "\n" for text in many)
    return path


def processes_below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.long
def test_killed_at_random_and_started_again_it_makes_the_same_shards(tmp_path: Path) -> None:
    path = large_corpus(tmp_path)
    words = [str(path), "vocab_size=400"]
    whole = contents(prepared(*words, cwd=tmp_path, out="whole"))
    source, kills = random.Random(SEED), 0
    partial = tmp_path / "out.partial" / "chunks"
    for wanted in sorted(source.sample(range(1, 10), 4)):
        process = command.start("prepare", *words, "out=out", cwd=tmp_path)
        # As soon as so many chunks are there, and a little later: within another one.
        while process.poll() is None and len(list(partial.glob("*.json"))) < wanted:
            time.sleep(0.002)
        time.sleep(source.random() * 0.1)
        children = processes_below(psutil.Process(process.pid))
        kills += process.poll() is None
        process.kill()
        process.communicate()
        # Nobody goes on writing behind the back of the next call.
        _, alive = psutil.wait_procs(children, timeout=30)
        assert alive == []
        assert not (tmp_path / "out").exists()
    assert kills == 4
    done = prepare(*words, "out=out", "workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stderr
    assert contents(tmp_path / "out") == whole
    assert not (tmp_path / "out.partial").exists()


def test_interrupted_it_ends_at_once_says_so_and_goes_on_later(tmp_path: Path) -> None:
    path = large_corpus(tmp_path)
    process = command.start("prepare", str(path), "vocab_size=400", "out=out", cwd=tmp_path)
    while not list((tmp_path / "out.partial" / "chunks").glob("*.json")):
        time.sleep(0.01)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = prepare(path, "vocab_size=400", "out=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "going on with" in done.stderr


def test_changed_files_or_settings_start_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    path.write_text(path.read_text() + "{\n")
    assert prepare(path, "tokenizer=byte", "out=out", cwd=tmp_path).returncode == 2
    assert (tmp_path / "out.partial").exists()
    write_jsonl(tmp_path)
    folder = prepared(path, "tokenizer=byte", cwd=tmp_path)
    assert sorted(documents(folder, "train") + documents(folder, "validation")) == sorted(DOCUMENTS)


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path)
    folder = prepared(path, "tokenizer=byte", cwd=tmp_path)
    before = contents(folder)
    again = prepare(path, "tokenizer=byte", "out=out", cwd=tmp_path)
    assert again.returncode == 0
    assert "was prepared before" in again.stderr
    other = prepare(path, "vocab_size=300", "out=out", cwd=tmp_path)
    assert other.returncode == 2
    assert "of other files or settings" in other.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert prepare(path, "tokenizer=byte", "out=mine", cwd=tmp_path).returncode == 2
    (tmp_path / "mine2.partial").mkdir()
    (tmp_path / "mine2.partial" / "thesis.txt").write_text("x")
    assert prepare(path, "tokenizer=byte", "out=mine2", cwd=tmp_path).returncode == 2
    assert (tmp_path / "mine2.partial" / "thesis.txt").read_text() == "x"
    assert contents(folder) == before


def test_damage_is_found_by_verify_and_by_training(tmp_path: Path) -> None:
    folder = prepared(write_jsonl(tmp_path), "tokenizer=byte", cwd=tmp_path)
    assert prepare("--verify", folder, cwd=tmp_path).returncode == 0
    shard = folder / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    damaged = prepare("--verify", folder, cwd=tmp_path)
    assert damaged.returncode == 6
    assert "train-00000.bin" in damaged.stderr
    os.truncate(shard, len(data) - 2)
    refused = command.run("recipe=llama_ddp", f"data.path={folder}", "run=x", *command.SMALL, "train.steps=4", cwd=tmp_path)
    assert refused.returncode == 6, refused.stderr
    assert "train-00000.bin" in refused.stdout + refused.stderr


def test_training_reads_what_prepare_made(tmp_path: Path) -> None:
    folder = prepared(write_jsonl(tmp_path), "vocab_size=300", cwd=tmp_path)
    manifest = DataManifest.load(folder)
    run = command.run("recipe=llama_fsdp", "data.path=out", "run=x", *command.SMALL, "train.steps=4", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = (tmp_path / "runs").glob("*-x")
    copy = DataManifest.load(path / "data")
    assert (copy.id, copy.kind, copy.statistics) == (manifest.id, "prepared", manifest.statistics)
    assert copy.baselines["unigram"] > 0
    rows = [json.loads(line) for line in (path / "attempts/0001/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 4]
