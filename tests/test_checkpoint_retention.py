"""Which checkpoint is the newest, which stay, which go, and what readers see meanwhile."""

from __future__ import annotations

from checkpoint_cases import flip, found, names, next_attempt, save, tree

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.run_dir import Attempt


def test_retention_keeps_the_newest_and_removes_what_dead_attempts_left(attempt: Attempt) -> None:
    for step in (1, 2, 3):
        save(attempt, step, keep_last=2)
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000003"]
    for name in ("step-00000004.tmp-0001", "step-00000001.removed-0001"):
        (attempt.run.checkpoints / name).mkdir()
        (attempt.run.checkpoints / name / "rank-00000.safetensors").write_bytes(b"half")
    save(next_attempt(attempt), 4, keep_last=1)
    assert names(attempt.run) == ["latest", "step-00000004"]
    assert (attempt.run.checkpoints / "latest").read_text() == "step-00000004\n"


def test_only_complete_folders_count_whatever_latest_says(attempt: Attempt) -> None:
    save(attempt, 1)
    save(attempt, 2)
    (attempt.run.checkpoints / "step-00000002" / "MANIFEST.json").unlink()
    assert (attempt.run.checkpoints / "latest").read_text() == "step-00000002\n"
    assert [info.step for info in list_checkpoints(attempt.run)] == [1]
    (attempt.run.checkpoints / "latest").write_text("../../elsewhere\n")
    assert found(attempt.run) == (1, [], [])


def test_a_step_reached_again_is_never_overwritten_and_the_rerun_is_the_newest(attempt: Attempt) -> None:
    save(attempt, 1, keep_last=9)
    damaged = save(attempt, 2, keep_last=9)
    flip(damaged / "rank-00000.safetensors", -1)
    before = {name: data for name, data in tree(attempt.run).items() if "step-" in name}
    later = next_attempt(attempt)
    assert found(attempt.run)[0] == 1
    assert save(later, 2, keep_last=9).name == "step-00000002.r1"
    assert found(attempt.run) == (2, [], [])
    assert save(later, 3, keep_last=9).name == "step-00000003.r1"
    assert [info.path.name for info in list_checkpoints(attempt.run)] == [
        *("step-00000003.r1", "step-00000002.r1", "step-00000002", "step-00000001")
    ]
    assert before.items() <= tree(attempt.run).items()


def test_the_same_step_saved_twice_is_there_once_if_nothing_differs(attempt: Attempt) -> None:
    first = save(attempt, 5)
    assert save(next_attempt(attempt), 5) == first
    assert names(attempt.run) == ["latest", "step-00000005"]
    assert save(attempt.run.attempts()[-1], 5, seed=6).name == "step-00000005.r1"
    assert found(attempt.run)[2] == []
