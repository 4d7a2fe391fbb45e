"""`prepare` from beginning to end: plan, tokenizer, processes, and going on where an earlier call was ended.

Everything is made in `OUT.partial` and renamed when it is whole. A chunk counts as done when its record is there, and
a record is written last and in one step; so a call may be killed at any moment, and the next one, with the same files
and settings and any number of processes, makes the same bytes.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.data.corpus.assemble import assemble, clear
from factory_train.data.corpus.chunks import Chunk, plan_chunks
from factory_train.data.corpus.documents import Rejects, passages
from factory_train.data.corpus.encode import CHUNKS, ChunkEncoder, record_path
from factory_train.data.corpus.inputs import InputFile, Inputs
from factory_train.data.corpus.request import Request
from factory_train.data.corpus.tokenizer_choice import TRAINED, ChosenTokenizer, given, trained
from factory_train.data.manifest import MANIFEST_NAME, SOURCE_NAME, TOKENIZER_NAME, DataManifest, digest
from factory_train.data.tokenizer import END_OF_TEXT, Tokenizer
from factory_train.errors import ConfigError, DataError, FactoryTrainError, PreflightError
from factory_train.units import format_bytes

# What the tokens of a dataset are made by; raised when the same text would become other tokens.
_VERSION = 1
_REQUEST = "request.json"
# More text would not change a vocabulary of some ten thousands by much, and training it takes one process.
_TRAINING_BYTES = 32 * 2**20
_POLL_S = 0.1
# How often a process says how far it is, and hears that it is to end.
_COUNTED_BYTES = 2**18


@dataclass(frozen=True)
class TokenizerRequest:
    """Which tokenizer: "bpe", "byte", or a file or folder; how large a trained one; what ends a document."""

    word: str
    vocab_size: int
    eos: str


@dataclass(frozen=True)
class Result:
    """A dataset that is ready.

    Args:
        manifest: of it.
        encoded_tokens: by this call; an earlier one may have made the rest.
        seconds: spent encoding.
    """

    manifest: DataManifest
    encoded_tokens: int
    seconds: float


def build(
    inputs: Inputs,
    out: Path,
    request: Request,
    tokenizer: TokenizerRequest,
    *,
    workers: int,
    report: Callable[[str], None],
    progress: Callable[[int], contextlib.AbstractContextManager[Callable[[int], None]]],
) -> Result:
    """Makes the dataset `out` of files, or finishes it.

    Args:
        inputs: the files.
        out: a folder that is not there yet, or holds this very dataset.
        request: how the files are read.
        tokenizer: what they are encoded with.
        workers: processes.
        report: called with a line at each stage.
        progress: given the bytes that are to be read, opens something that is told of them as they are.
    Raises:
        ConfigError: there is something else at `out`.
        DataError: the text or the tokenizer cannot be used.
        PreflightError: another process works on `out`.
    """
    chosen = None if tokenizer.word in TRAINED else given(tokenizer.word, tokenizer.eos)
    chunks = plan_chunks(inputs.files, field=request.field, by_line=request.by_line, validation_fraction=request.validation_fraction)
    asked = _asked(inputs, request, tokenizer, chosen)
    if out.exists():
        return Result(_made_before(out, asked), 0, 0.0)
    partial = out.with_name(out.name + ".partial")
    with _owned(partial):
        if (partial / MANIFEST_NAME).exists():
            # All but the renaming was done; whether it is what is asked for shows there.
            _finish(partial, out)
            return Result(_made_before(out, asked), 0, 0.0)
        if _begin(partial, asked):
            report(f"going on with {partial}")
        storage.write_json(partial / SOURCE_NAME, asked)
        chosen = _tokenizer(partial, inputs.files, chunks, request, tokenizer, chosen, report)
        todo = [number for number in range(len(chunks)) if not record_path(partial, number).exists()]
        started = time.monotonic()
        if todo:
            report(f"encoding {len(todo):,} of {len(chunks):,} chunks in {min(workers, len(todo))} processes")
            with progress(sum(_num_bytes(chunks[number]) for number in todo)) as read:
                _encode(
                    _Work(inputs.files, request, str(partial), chosen.eos_id), [(number, chunks[number]) for number in todo], workers, read
                )
        seconds = time.monotonic() - started
        encoded = sum(_tokens_of(partial, number) for number in todo)
        manifest = assemble(partial, len(chunks), chosen, request, _description(inputs))
        _finish(partial, out)
    return Result(manifest, encoded, seconds)


def _finish(partial: Path, out: Path) -> None:
    """Moves a complete dataset to its place."""
    clear(partial)
    for name in (_REQUEST, "lock"):
        (partial / name).unlink(missing_ok=True)
    storage.fsync_directory(partial)
    os.rename(partial, out)
    storage.fsync_directory(out.parent)


def _asked(inputs: Inputs, request: Request, tokenizer: TokenizerRequest, chosen: ChosenTokenizer | None) -> dict[str, Any]:
    """Returns what the dataset follows from: files by name, size and time, settings, and the tokenizer."""
    words: dict[str, Any] = {"kind": tokenizer.word, "vocab_size": tokenizer.vocab_size if tokenizer.word == "bpe" else None}
    if chosen is not None:
        words = {"sha256": hashlib.sha256(chosen.file).hexdigest(), "eos_id": chosen.eos_id}
    files = [{key: value for key, value in dataclasses.asdict(file).items() if key != "path"} for file in inputs.files]
    return {"version": _VERSION, "request": request.to_json(), "tokenizer": words, "files": files}


def _made_before(out: Path, asked: dict[str, Any]) -> DataManifest:
    """Returns the manifest of the dataset that is at `out` if it is the one that is asked for."""
    other = f"out={out}-2, or remove {out} first"
    if not (out / MANIFEST_NAME).is_file():
        raise ConfigError("there is something else already", where=str(out), fix=other)
    manifest = DataManifest.load(out)
    source = storage.read_json(out / SOURCE_NAME)
    if not isinstance(source, dict) or {key: source.get(key) for key in asked} != asked:
        raise ConfigError("there is a dataset already, of other files or settings", where=str(out), fix=other)
    manifest.check_sizes(out)
    return manifest


@contextlib.contextmanager
def _owned(partial: Path) -> Iterator[None]:
    """Holds the folder that is being built for this process alone."""
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PreflightError("another process is at work on it", where=str(partial), fix="wait for it, or out=ANOTHER") from None
        yield


def _begin(partial: Path, asked: dict[str, Any]) -> bool:
    """Returns whether an earlier call for the same has left something to go on with; what another one left is removed."""
    name = digest(asked)
    before = storage.read_json(partial / _REQUEST)
    if before == {"id": name}:
        return True
    strangers = [path for path in partial.iterdir() if path.name not in ("lock", _REQUEST)]
    if strangers and before is None:
        raise ConfigError("there is something that prepare did not make", where=str(partial), fix="out=ANOTHER, or remove the folder")
    for path in strangers:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (partial / CHUNKS).mkdir(exist_ok=True)
    storage.write_json(partial / _REQUEST, {"id": name})
    return False


def _tokenizer(
    partial: Path,
    files: Sequence[InputFile],
    chunks: Sequence[Chunk],
    request: Request,
    asked: TokenizerRequest,
    chosen: ChosenTokenizer | None,
    report: Callable[[str], None],
) -> ChosenTokenizer:
    """Returns the tokenizer of the dataset, which is stored there by now; one that is trained is trained once."""
    path = partial / TOKENIZER_NAME
    if chosen is None and path.exists():
        eos_id = Tokenizer.load(path, None).token_id(END_OF_TEXT)
        return ChosenTokenizer(asked.word, path.read_bytes(), eos_id)
    if chosen is None:
        if asked.word == "bpe":
            report(f"training a BPE tokenizer of {asked.vocab_size:,} tokens")
        chosen = trained(asked.word, _training_texts(files, chunks, request) if asked.word == "bpe" else (), asked.vocab_size)
    storage.write_atomic(path, chosen.file)
    return chosen


def _training_texts(files: Sequence[InputFile], chunks: Sequence[Chunk], request: Request) -> Iterator[str]:
    """Yields training text from the beginning of every chunk."""
    share = _TRAINING_BYTES // len(chunks)
    rejects = Rejects(request.skip_malformed)
    for chunk in chunks:
        room = share
        for span in chunk:
            if room <= 0:
                break
            for passage in passages(
                files[span.file], span, column=request.field, by_line=request.by_line, rejects=rejects, read=lambda _: None
            ):
                if not passage.is_held_out(request.validation_fraction):
                    yield passage.text[:room]
                    room -= len(passage.text)
                if room <= 0:
                    break


def _num_bytes(chunk: Chunk) -> int:
    return sum(span.num_bytes for span in chunk)


def _tokens_of(partial: Path, number: int) -> int:
    record = storage.read_json(record_path(partial, number))
    return int(record["train"]["num_tokens"] + record["validation"]["num_tokens"])


def _description(inputs: Inputs) -> str:
    names = inputs.files[0].name if len(inputs.files) == 1 else f"{len(inputs.files):,} files, {inputs.files[0].name} first"
    return f"{names} ({format_bytes(inputs.num_bytes)})"


@dataclass(frozen=True)
class _Work:
    """What every process has to know."""

    files: Sequence[InputFile]
    request: Request
    folder: str
    eos_id: int | None


def _encode(work: _Work, todo: Sequence[tuple[int, Chunk]], workers: int, read: Callable[[int], None]) -> None:
    # Started anew, not forked: this process may have threads, and the tokenizer's do not survive a fork.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    shown = 0
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context, _begin_work, (work, counter, stop))
    try:
        futures = [pool.submit(_encode_chunk, number, chunk) for number, chunk in todo]
        waiting = set(futures)
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, _POLL_S, concurrent.futures.FIRST_EXCEPTION)
            seen = counter.value
            read(seen - shown)
            shown = seen
            for future in done:
                future.result()
    except BrokenProcessPool:
        fix = "fewer processes need less memory: workers=1; the same command goes on where this one ended"
        raise FactoryTrainError("a process was killed, most often for want of memory", where="prepare", fix=fix) from None
    finally:
        # Chunks that are under way are worth nothing without their record, and the next call makes them again.
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: ChunkEncoder | None = None
_count: Callable[[int], None]


def _begin_work(work: _Work, counter: Any, stop: Any) -> None:
    """Makes this process one of the workers."""
    global _encoder, _count
    # Ctrl-C reaches all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # As many processes as cores are at work: threads of the tokenizer would only get in each other's way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.load(Path(work.folder) / TOKENIZER_NAME, work.eos_id)
    _encoder = ChunkEncoder(work.files, work.request, tokenizer, Path(work.folder))

    waiting = 0

    def count(num_bytes: int) -> None:
        nonlocal waiting
        waiting += num_bytes
        if waiting >= _COUNTED_BYTES:
            with counter.get_lock():
                counter.value += waiting
            waiting = 0
            if stop.is_set():
                os._exit(1)

    _count = count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(number: int, chunk: Chunk) -> None:
    assert _encoder is not None
    _encoder.encode(number, chunk, _count)


def verify(folder: Path) -> DataManifest:
    """Reads every file of a dataset and compares its hash.

    Raises:
        DataError: there is no dataset.
        IntegrityError: names the file that differs.
    """
    if not (folder / MANIFEST_NAME).is_file():
        raise DataError("no prepared data here", where=str(folder), fix="a folder that prepare made")
    manifest = DataManifest.load(folder)
    manifest.verify(folder)
    return manifest
