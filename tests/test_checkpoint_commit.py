"""A save that is cut short, fails or is overtaken leaves what was there before, or the whole new checkpoint."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks
import pytest
import torch
from checkpoint_cases import found, history, names, next_attempt, save, tree
from rank_pool import RankPool

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.errors import CheckpointError, FencedError
from factory_train.run_dir import Attempt, RunDir


# Every moment of a save, of every rank: before and after each write, fsync, rename, ...
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("mode", "world", "strategy"),
    [
        ("sync", 1, "single"),
        ("async", 1, "single"),
        pytest.param("async", 4, "ddp4", marks=pytest.mark.long),
        pytest.param("sync", 4, "ddp4", marks=pytest.mark.long),
    ],
)
def test_a_crash_at_any_point_leaves_the_old_checkpoint_or_the_new_one_whole(
    pool: RankPool, tmp_path: Path, mode: str, world: int, strategy: str
) -> None:
    original = history(tmp_path / "original").run
    # What an attempt that was killed leaves behind: it has to be cleared away, which has moments of its own.
    half = original.checkpoints / "step-00000003.tmp-0001"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")

    def saved(name: str, crash: tuple[int, int] | None) -> tuple[Attempt, list[tuple[str, list[tuple[str, str, str]]]]]:
        attempt = next_attempt(RunDir(shutil.copytree(original.path, tmp_path / name)).attempts()[0])
        return attempt, run_ranks(pool, world, ranks.save_to_the_point, strategy, mode, attempt, 3, crash)

    _, rehearsal = saved("rehearsal", None)
    assert [end for end, _ in rehearsal] == ["done"] * world
    assert {action for _, points in rehearsal for _, action, _ in points} == {
        *("mkdir", "create", "write", "fsync", "fsync folder", "rename", "point", "unlink", "rmdir")
    }
    tried = set()
    for rank, (_, points) in enumerate(rehearsal):
        # Copies of a path are alike: of the ranks that only write a part, the second and the last are tried.
        for number in range(len(points)) if rank in (0, 1, world - 1) else ():
            attempt, ends = saved(f"crash-{rank}-{number}", (rank, number))
            end, passed = ends[rank]
            assert end in ("crash", "CheckpointError"), (rank, passed[-1], ends)
            # The rename is the moment that counts: from then on the new one is found, before it the old one.
            expected = 3 if ("after", "rename", "step-00000003") in passed else 2
            assert found(attempt.run) == (expected, [], []), (rank, passed[-1])
            for info in list_checkpoints(attempt.run):
                CheckpointReader(info.path).verify()
            # Nothing that is left hinders the next attempt, and all of it goes.
            save(next_attempt(attempt), 4)
            assert found(attempt.run) == (4, [], [])
            assert [info.step for info in list_checkpoints(attempt.run)] == [4, expected]
            assert names(attempt.run) == sorted([f"step-{expected:08d}", "step-00000004", "latest"])
            shutil.rmtree(attempt.run.path)
            tried.add((rank, len(passed), *passed[-1]))
    print(f"{mode}, {world} ranks: {len(tried)} points of a save tried")
    assert any(moment[2:] == ("after", "rename", "step-00000003") for moment in tried)


def run_ranks(pool: RankPool, world: int, task: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls a task on real ranks; a world of one needs no other process."""
    return pool.run(world, task, *args) if world > 1 else [task(0, 1, *args)]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("failing_rank", "action", "error", "word"),
    [
        (1, "write", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (0, "create", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (1, "fsync", ValueError("not an input/output error"), "ValueError"),
        (0, "rename", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_a_failure_on_one_rank_is_the_same_error_on_all_and_the_next_save_works(
    pool: RankPool, attempt: Attempt, failing_rank: int, action: str, error: Exception, word: str
) -> None:
    pool.run(2, ranks.save, "fsdp2", attempt, 1, 1)
    raised = pool.run(2, ranks.save_with_failure, attempt, failing_rank, action, error)
    assert raised[0] == raised[1]
    assert raised[0][0] == "CheckpointError"
    assert f"rank {failing_rank}" in raised[0][1]
    assert word in raised[0][1]
    # The space is given back at once, and nothing is left of the attempt to save.
    assert names(attempt.run) == ["latest", "step-00000001"]
    assert found(attempt.run) == (1, [], [])
    pool.run(2, ranks.save, "fsdp2", attempt, 2, 2)
    assert found(attempt.run) == (2, [], [])


def test_state_that_json_cannot_hold_is_refused_and_changes_nothing(attempt: Attempt) -> None:
    save(attempt, 1)
    for value in (torch.zeros(2), float("nan")):
        with pytest.raises(CheckpointError, match="JSON"):
            save(attempt, 2, state={"cursor": value})
    assert names(attempt.run) == ["latest", "step-00000001"]


def test_an_attempt_that_was_superseded_changes_nothing(tmp_path: Path) -> None:
    attempt = history(tmp_path)
    next_attempt(attempt)
    before = tree(attempt.run)
    with pytest.raises(FencedError):
        save(attempt, 3, keep_last=1)
    assert tree(attempt.run) == before


@pytest.mark.parametrize("moment", [("after", "mkdir"), ("after", "create"), ("before", "fsync folder")])
def test_an_attempt_superseded_in_mid_save_commits_moves_and_deletes_nothing(tmp_path: Path, moment: tuple[str, str]) -> None:
    attempt = history(tmp_path)
    before = tree(attempt.run)

    def supersede(when: str, action: str, path: Path) -> None:
        if (when, action) == moment and attempt.is_newest():
            next_attempt(attempt)

    with pytest.raises(FencedError):
        save(attempt, 3, keep_last=1, files=DurableFiles(supersede))
    after = tree(attempt.run)
    assert {name: data for name, data in after.items() if ".tmp-" not in name} == before
    assert found(attempt.run) == (2, [], [])


def test_a_rank_that_wakes_up_just_before_its_rename_finds_its_draft_gone(tmp_path: Path) -> None:
    attempt = history(tmp_path)

    def overtake(when: str, action: str, path: Path) -> None:
        if (when, action) == ("before", "rename") and attempt.is_newest():
            save(next_attempt(attempt), 3, seed=33)

    with pytest.raises(CheckpointError):
        save(attempt, 3, files=DurableFiles(overtake))
    assert CheckpointReader(attempt.run.checkpoints / "step-00000003").manifest.attempt == 2
    assert found(attempt.run) == (3, [], [])
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000003"]
