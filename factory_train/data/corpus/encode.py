"""One chunk of a corpus to tokens: what each of the processes does, over and over."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from factory_train import storage
from factory_train.data.corpus.chunks import Chunk
from factory_train.data.corpus.documents import Passage, Rejects, passages
from factory_train.data.corpus.inputs import InputFile
from factory_train.data.corpus.request import Request
from factory_train.data.shards import HashedFile, stored, token_dtype
from factory_train.data.tokenizer import Tokenizer, pieces

CHUNKS = "chunks"
# Characters encoded by one call: much more would only cost memory.
_BATCH_CHARACTERS = 2**20
# A longer document of the validation split is kept in parts of so many tokens, so that the split can be shuffled.
VALIDATION_PART = 2**14


@dataclass
class _Split:
    """Tokens of one split of a chunk while they are written.

    Args:
        path: file of the tokens; not made before there are any.
        dtype: of a token on disk.
    """

    path: Path
    dtype: np.dtype[Any]
    num_tokens: int = 0
    num_bytes: int = 0
    starts: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    file: HashedFile | None = None

    def append(self, tokens: npt.NDArray[Any]) -> None:
        if len(tokens):
            self.file = self.file or HashedFile(self.path)
            self.file.write(tokens.astype(self.dtype, copy=False).tobytes())
            self.num_tokens += len(tokens)

    def close(self) -> dict[str, Any]:
        """Returns the part of the chunk's record that is about this split."""
        # A file, and not part of the record: there may be millions.
        np.asarray(self.starts, dtype="<i8").tofile(self.path.with_suffix(".starts"))
        record = self.file.close() if self.file else None
        return {
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "shard": {"name": record.name, "num_bytes": record.num_bytes, "sha256": record.sha256} if record else None,
        }


class ChunkEncoder:
    """Encodes chunks of a corpus into a folder.

    Args:
        files: of the corpus.
        request: how they are read.
        tokenizer: of the corpus.
        folder: of the dataset that is being built; training shards go there, everything else of a chunk below `chunks/`.
    """

    def __init__(self, files: Sequence[InputFile], request: Request, tokenizer: Tokenizer, folder: Path) -> None:
        self._files, self._request, self._tokenizer, self._folder = files, request, tokenizer, folder
        self._dtype = stored(token_dtype(tokenizer.vocab_size))

    def encode(self, number: int, chunk: Chunk, read: Callable[[int], None]) -> None:
        """Writes the tokens of a chunk and then its record, whose presence says that the chunk is done.

        Args:
            number: of the chunk.
            read: told of bytes of the files that have been read.
        Raises:
            DataError: a malformed document that is not to be skipped.
        """
        rejects, texts, documents, empty = Rejects(self._request.skip_malformed), hashlib.sha256(), 0, 0
        train = _Split(self._folder / f"train-{number:05d}.bin", self._dtype)
        validation = _Split(self._folder / CHUNKS / f"validation-{number:05d}.bin", self._dtype)
        for passage, ids in self._encoded(self._documents(chunk, rejects, read)):
            if not passage.text.strip() and passage.begins and passage.ends:
                empty += 1
                continue
            # The held-out tail of a text file is no document of its own.
            documents += passage.begins and passage.split != "validation"
            data = passage.text.encode()
            texts.update(len(data).to_bytes(8, "little"))
            texts.update(data)
            held_out = passage.is_held_out(self._request.validation_fraction)
            self._append(validation if held_out else train, passage, ids, len(data), in_parts=held_out)
        names = np.frombuffer(b"".join(validation.names), dtype="<u8")
        names.tofile(validation.path.with_suffix(".names"))
        record = {
            "train": train.close(),
            "validation": validation.close(),
            "text_sha256": texts.hexdigest(),
            "documents": documents,
            "empty": empty,
            "skipped": dict(rejects.counts),
            "examples": rejects.examples,
        }
        storage.write_json(record_path(self._folder, number), record)

    def _documents(self, chunk: Chunk, rejects: Rejects, read: Callable[[int], None]) -> Iterator[Passage]:
        for span in chunk:
            file = self._files[span.file]
            yield from passages(file, span, column=self._request.field, by_line=self._request.by_line, rejects=rejects, read=read)

    def _encoded(self, documents: Iterator[Passage]) -> Iterator[tuple[Passage, list[npt.NDArray[Any]]]]:
        """Yields documents with their tokens, in order, encoding many with each call."""
        batch: list[tuple[Passage, list[str]]] = []
        room = _BATCH_CHARACTERS
        for passage in documents:
            text = passage.text
            parts = list(pieces(text)) if self._tokenizer.cuts_at_line_ends else [text]
            batch.append((passage, parts))
            room -= len(text)
            if room <= 0:
                yield from self._encode_batch(batch)
                batch, room = [], _BATCH_CHARACTERS
        yield from self._encode_batch(batch)

    def _encode_batch(self, batch: list[tuple[Passage, list[str]]]) -> Iterator[tuple[Passage, list[npt.NDArray[Any]]]]:
        encoded = iter(self._tokenizer.encode_batch([part for _, parts in batch for part in parts]))
        for passage, parts in batch:
            yield passage, [np.asarray(next(encoded), dtype=self._dtype) for _ in parts]

    def _append(self, split: _Split, passage: Passage, ids: list[npt.NDArray[Any]], num_bytes: int, *, in_parts: bool) -> None:
        if passage.ends and self._tokenizer.eos_id is not None:
            ids = [*ids, np.asarray([self._tokenizer.eos_id], dtype=self._dtype)]
        if passage.begins:
            split.starts.append(split.num_tokens)
            split.names.append(_digest(passage.name))
        split.num_bytes += num_bytes
        if not in_parts:
            for tokens in ids:
                split.append(tokens)
            return
        tokens = np.concatenate(ids) if ids else np.empty(0, dtype=self._dtype)
        for start in range(0, len(tokens), VALIDATION_PART):
            if start or not passage.begins:
                split.starts.append(split.num_tokens)
                split.names.append(_digest(f"{passage.name}+{split.num_tokens}"))
            split.append(tokens[start : start + VALIDATION_PART])


def record_path(folder: Path, number: int) -> Path:
    """Returns where the record of a chunk is, once the chunk is done."""
    return folder / CHUNKS / f"{number:05d}.json"


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()[:8]
