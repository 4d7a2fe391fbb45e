"""Saving while training waits: every rank writes its part from the live tensors, then one commits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.catalog import draft_path
from factory_train.checkpoint.commit import Committed, commit, open_draft
from factory_train.checkpoint.entries import TensorEntry, Writes, plan_writes
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.part import Piece, write_part, writer_name
from factory_train.checkpoint.retention import Retention
from factory_train.errors import FactoryTrainError, FencedError
from factory_train.run_dir import Attempt


def save_checkpoint(
    attempt: Attempt,
    step: int,
    entries: Sequence[TensorEntry],
    state: Mapping[str, Any],
    *,
    rank: int,
    world_size: int,
    retention: Retention,
    files: DurableFiles | None = None,
    group: dist.ProcessGroup | None = None,
) -> Committed:
    """Saves a checkpoint; every rank calls it. Returns once it is complete and durable.

    Args:
        attempt: the writer; it must still be the run's newest attempt.
        step: completed optimizer steps.
        entries: what this rank holds.
        state: run state as JSON values; that of rank 0 is written.
        retention: what is kept of the older ones.
        files: the filesystem operations (tests stop them).
        group: ranks to agree with; default: all.

    Raises:
        CheckpointError: it could not be written on some rank; the same on all ranks.
        FencedError: a newer attempt exists; nothing was committed.
    """
    files = files or DurableFiles()
    ranks = Ranks(rank, world_size, group)
    writes = plan_writes(entries, step, rank, state)
    draft = draft_path(attempt, step)
    writers = [writer_name(index) for index in range(world_size)]
    try:
        ranks.agree_on_main("opening a checkpoint", lambda: str(open_draft(attempt, step, files)))
        ranks.agree("writing a checkpoint", lambda: write_part(draft, writes.part, _from_tensors(writes), files))
        done = ranks.agree_on_main("committing a checkpoint", lambda: commit(attempt, step, writers, retention, files).to_json())
    except FencedError:
        raise
    except FactoryTrainError:
        if rank == 0:
            give_back_space(attempt, step, files)
        raise
    return Committed(**done)


def give_back_space(attempt: Attempt, step: int, files: DurableFiles) -> None:
    """Removes the draft of a save that failed on all ranks. That is a courtesy; the error is what matters."""
    if attempt.is_newest():
        with contextlib.suppress(OSError):
            files.remove_folder(draft_path(attempt, step))


def _from_tensors(writes: Writes) -> Callable[[Piece], memoryview]:
    """Returns a reader over live tensors; it holds the host copy of one tensor at a time."""
    starts = dict(writes.sources)
    held: list[tuple[int, memoryview]] = []

    def read(piece: Piece) -> memoryview:
        if piece.start in starts:
            host = starts[piece.start].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            held[:] = [(piece.start, host.numpy().data)]
        first, data = held[0]
        return data[piece.start - first : piece.start - first + piece.num_bytes]

    return read
