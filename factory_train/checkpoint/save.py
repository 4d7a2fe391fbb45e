"""Saving: drafts, checksums, and the one rename that makes a checkpoint exist."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.catalog import LATEST_NAME, clear_leftovers, draft_path, place, retain
from factory_train.checkpoint.files import DurableFiles, NewFile
from factory_train.checkpoint.format import (
    DTYPES,
    FORMAT_VERSION,
    MANIFEST_NAME,
    STATE_NAME,
    Chunk,
    Contents,
    FileRecord,
    Manifest,
    TensorRecord,
    Tensors,
    canonical_json,
    encode_header,
    merge_contents,
    spread,
)
from factory_train.distributed.box import Box, local_box, local_tensor, replica_rank_and_count
from factory_train.errors import FactoryTrainError, FencedError
from factory_train.run_dir import Attempt

# Large enough for a parallel filesystem's stripes, small enough to stay in cache between checksum and write.
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorEntry:
    """What this rank holds of one tensor.

    Args:
        name: parameter name, the same under every strategy.
        section: "weights", "optimizer/exp_avg", ...
        tensor: the local part, on any device, of shape `box.shape`; loading fills it in place.
        box: which part of the whole it is; it may be empty.
        global_shape: shape of the whole tensor.
        replica_rank, replica_count: which copy of this box the rank holds, out of how many. Ranks that share copies
            must pass the same entries, for each decides alone which of them it writes.
    """

    name: str
    section: str
    tensor: torch.Tensor
    box: Box
    global_shape: tuple[int, ...]
    replica_rank: int = 0
    replica_count: int = 1

    @staticmethod
    def of(section: str, name: str, tensor: torch.Tensor) -> TensorEntry:
        """Describes a plain tensor (held by all ranks) or a DTensor."""
        box, global_shape = local_box(tensor)
        return TensorEntry(name, section, local_tensor(tensor.detach()), box, global_shape, *replica_rank_and_count(tensor))

    @property
    def key(self) -> str:
        """Name of the tensor inside a safetensors file."""
        return f"{self.section}/{self.name}"

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        return self.box.numel * self.tensor.element_size()


def save_checkpoint(
    attempt: Attempt,
    step: int,
    entries: Sequence[TensorEntry],
    state: dict[str, Any],
    *,
    rank: int,
    world_size: int,
    keep_last: int,
    files: DurableFiles | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Saves a checkpoint; every rank calls it. Returns its folder once it is complete and durable.

    Nothing that a reader takes for a checkpoint exists before the rename at the end, and nothing older is touched
    before that either. The folder's name follows `catalog.place`; if the newest checkpoint already holds exactly the
    same, that one is returned.

    Args:
        attempt: the writer; it must still be the run's newest attempt.
        step: completed optimizer steps.
        entries: what this rank holds.
        state: run state as JSON values; that of rank 0 is written.
        keep_last: newest checkpoints kept, this one included.
        files: the filesystem operations (tests stop them).
        group: ranks to agree with; default: all.

    Raises:
        CheckpointError: it could not be written on some rank; the same on all ranks.
        FencedError: a newer attempt exists; nothing was committed.
    """
    files = files or DurableFiles()
    ranks = Ranks(rank, world_size, group)
    draft = draft_path(attempt, step)
    ranks.agree_on_main("opening a checkpoint", lambda: _open_draft(attempt, draft, files))
    try:
        ranks.agree("writing a checkpoint", lambda: _write_part(draft, step, entries, state, rank, files))
        return attempt.run.checkpoints / ranks.agree_on_main(
            "committing a checkpoint", lambda: _commit(attempt, step, draft, world_size, keep_last, files)
        )
    except FencedError:
        raise
    except FactoryTrainError:
        # All ranks have stopped writing: rank 0 gives the space back. That is a courtesy; the error is what matters.
        if rank == 0 and attempt.is_newest():
            with contextlib.suppress(OSError):
                files.remove_folder(draft)
        raise


def _open_draft(attempt: Attempt, draft: Path, files: DurableFiles) -> None:
    attempt.check_fence("saving a checkpoint")
    if not draft.parent.is_dir():
        files.make_folder(draft.parent)
        files.sync_folder(draft.parent.parent)
    clear_leftovers(attempt, files)
    if draft.exists():
        files.remove_folder(draft)
    files.make_folder(draft)


def _part_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _write_part(draft: Path, step: int, entries: Sequence[TensorEntry], state: dict[str, Any], rank: int, files: DurableFiles) -> None:
    """Writes this rank's tensors (and, on rank 0, the run state), then the list of what it wrote."""
    contents = Contents({}, {})
    chosen = choose_writes(entries)
    if chosen:
        contents = _write_tensors(draft / f"rank-{rank:05d}.safetensors", step, chosen, files)
    for entry in entries:
        if not Box.whole(entry.global_shape).numel:
            # It has no bytes anywhere, but a reader must still find its shape.
            contents.tensors.setdefault(entry.section, {})[entry.name] = TensorRecord(entry.dtype, entry.global_shape, ())
    if rank == 0:
        data = canonical_json(state)
        files.write(draft / STATE_NAME, data)
        contents.files[STATE_NAME] = FileRecord(len(data), len(data), xxhash.xxh3_64_hexdigest(data))
    files.write(draft / _part_name(rank), canonical_json(contents.to_json()))


def choose_writes(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Returns the entries this rank writes: each replicated box falls to one of its copies, spread by bytes.

    Ordered for the file: wider types first, which keeps each tensor aligned.
    """
    chosen = []
    for count in sorted({entry.replica_count for entry in entries}):
        shared = sorted((entry for entry in entries if entry.replica_count == count and entry.box.numel), key=lambda entry: entry.key)
        writers = spread([entry.num_bytes for entry in shared], count)
        chosen += [entry for entry, writer in zip(shared, writers, strict=True) if writer == entry.replica_rank]
    return sorted(chosen, key=lambda entry: (-entry.tensor.element_size(), entry.key))


def _write_tensors(path: Path, step: int, entries: Sequence[TensorEntry], files: DurableFiles) -> Contents:
    """Writes one safetensors file, taking checksums on the way; holds one tensor in host memory at a time."""
    for entry in entries:
        assert entry.dtype in DTYPES, f"{entry.key}: {entry.dtype} is not in the format"
        assert tuple(entry.tensor.shape) == entry.box.shape, f"{entry.key}: {tuple(entry.tensor.shape)} is not {entry.box}"
    layout = {entry.key: (entry.dtype, entry.box.shape) for entry in entries}
    assert len(layout) == len(entries), "two entries of the same name"
    head = encode_header(layout, {"format": "pt", "factory_train_checkpoint": str(FORMAT_VERSION), "step": str(step)})
    tensors: Tensors = {}
    with files.create(path) as file:
        file.write(head)
        for entry in entries:
            digest = _write_values(file, entry.tensor)
            chunk = Chunk(path.name, entry.key, entry.box.offset, entry.box.shape, digest)
            tensors.setdefault(entry.section, {})[entry.name] = TensorRecord(entry.dtype, entry.global_shape, (chunk,))
    size = len(head) + sum(entry.num_bytes for entry in entries)
    return Contents(tensors, {path.name: FileRecord(size, len(head), xxhash.xxh3_64_hexdigest(head))})


def _write_values(file: NewFile, tensor: torch.Tensor) -> str:
    host = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    data = host.numpy().data
    digest = xxhash.xxh3_64()
    for start in range(0, len(data), _BLOCK_BYTES):
        block = data[start : start + _BLOCK_BYTES]
        digest.update(block)
        file.write(block)
    return digest.hexdigest()


def _commit(attempt: Attempt, step: int, draft: Path, world_size: int, keep_last: int, files: DurableFiles) -> str:
    """Turns a finished draft into a checkpoint; rank 0 only. Returns the name of the folder."""
    parts = [draft / _part_name(rank) for rank in range(world_size)]
    contents = merge_contents(Contents.from_json(json.loads(part.read_bytes())) for part in parts)
    manifest = Manifest(step, attempt.run.id, attempt.number, time.time(), world_size, contents)
    files.write(draft / MANIFEST_NAME, manifest.encode())
    for part in parts:
        # All that is in them is in the manifest now.
        files.remove_file(part)
    files.sync_folder(draft)
    attempt.check_fence("committing a checkpoint")
    target, is_there = place(attempt.run, manifest)
    if is_there:
        files.remove_folder(draft)
    else:
        attempt.check_fence("committing a checkpoint")
        files.rename(draft, target)
        files.sync_folder(target.parent)
    attempt.check_fence("moving the pointer to the latest checkpoint")
    files.point(target.parent / LATEST_NAME, target.name)
    retain(attempt, keep_last, files)
    return target.name
