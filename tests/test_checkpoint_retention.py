"""Which checkpoint is the newest, which stay, which go, and what readers see meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import checkpoint_ranks as ranks
import pytest
from checkpoint_cases import Bench, flip, found, names, next_attempt, save, tree
from conftest import REPOSITORY
from rank_pool import RankPool

from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.lease import Lease
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.checkpoint.retention import Retention, mark, metric_of, reasons_to_keep, removable, retain, unmark
from factory_train.errors import IntegrityError, NotFoundError
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


# --- policies


def saved_with_metrics(attempt: Attempt, losses: dict[int, float | None]) -> None:
    for step, loss in losses.items():
        metrics = {} if loss is None else {"validation/loss": loss}
        save(attempt, step, keep_last=99, state={"step": step, "seed": step, "metrics": metrics})


def kept(attempt: Attempt, policy: Retention) -> list[int]:
    retain(attempt, policy, DurableFiles())
    return sorted(info.step for info in list_checkpoints(attempt.run))


def test_the_last_the_best_every_nth_and_the_marked_stay_and_the_rest_goes(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: 5.0, 2: 3.0, 3: 4.0, 4: None, 5: 6.0, 6: 7.0, 7: 8.0, 8: None})
    mark(attempt.run, "step-00000001")
    policy = Retention(keep_last=2, keep_every_steps=5, keep_best=2)
    reasons = {info.step: why for info, why in reasons_to_keep(attempt.run, list_checkpoints(attempt.run), policy).items()}
    assert reasons == {1: ["marked"], 2: ["best"], 3: ["best"], 4: [], 5: ["every 5"], 6: [], 7: ["last"], 8: ["last"]}
    assert kept(attempt, policy) == [1, 2, 3, 5, 7, 8]
    assert unmark(attempt.run, "step-00000001")
    assert not unmark(attempt.run, "step-00000001")
    assert kept(attempt, Retention(keep_last=1, keep_best=1, best_is="max")) == [7, 8]


@pytest.mark.parametrize("metrics", [{}, None, {"validation/loss": "low"}, {"validation/loss": True}, {"other": 1.0}])
def test_what_is_no_figure_does_not_count_as_the_best(attempt: Attempt, metrics: object) -> None:
    path = save(attempt, 1, state={"step": 1, "seed": 1, "metrics": metrics})
    assert metric_of(path, "validation/loss") is None


def test_nothing_goes_while_the_newest_is_not_whole(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: None, 2: None, 3: None})
    truncated = attempt.run.checkpoints / "step-00000003" / "rank-00000.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1])
    assert kept(attempt, Retention(keep_last=1)) == [1, 2, 3]


def test_the_only_good_one_is_never_removable(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: None, 2: None, 3: None})
    flip(attempt.run.checkpoints / "step-00000003" / "rank-00000.safetensors", -1)
    asked = []

    def is_good(info: CheckpointInfo) -> bool:
        asked.append(info.step)
        try:
            with CheckpointReader(info.path) as reader:
                reader.verify()
        except IntegrityError:
            return False
        return True

    assert [info.step for info in removable(attempt.run, Retention(keep_last=1), is_good)] == [1]
    assert asked == [3, 2]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_make_the_new_one_a_failure(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: None, 2: None})

    def hook(when: str, action: str, path: Path) -> None:
        if action == "rename" and ".removed-" in path.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    bench = Bench(attempt, mode="sync", keep_last=1)
    bench.saver._files = DurableFiles(hook)
    bench.save(3)
    ((kind, facts),) = bench.events
    assert (kind, facts["warning"]) == ("checkpoint", "old checkpoints could not be removed: Permission denied")
    assert [info.step for info in list_checkpoints(attempt.run)] == [3, 2, 1]
    bench.saver._files = DurableFiles()
    bench.save(4)
    assert [info.step for info in list_checkpoints(attempt.run)] == [4]


# --- readers


def test_a_checkpoint_that_is_being_read_stays_until_the_reader_is_done(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: None, 2: None})
    program = "import sys; from pathlib import Path; from factory_train.checkpoint.lease import Lease\n"
    program += "lease = Lease.to_read(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(attempt.run.checkpoints / "step-00000001")]
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    other = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with CheckpointReader(attempt.run.checkpoints / "step-00000001"):
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert kept(attempt, Retention(keep_last=1)) == [1, 2]
    # Of two readers one is left.
    assert kept(attempt, Retention(keep_last=1)) == [1, 2]
    other.communicate("")
    assert kept(attempt, Retention(keep_last=1)) == [2]


def test_a_reader_that_comes_while_a_checkpoint_goes_finds_it_gone(attempt: Attempt) -> None:
    saved_with_metrics(attempt, {1: None, 2: None})
    path = attempt.run.checkpoints / "step-00000001"
    lease = Lease.to_remove(path)
    assert lease is not None
    with pytest.raises(NotFoundError, match="being removed"):
        CheckpointReader(path)
    path.rename(path.with_name("step-00000001.removed-0001"))
    lease.close()
    with pytest.raises(NotFoundError):
        CheckpointReader(path)
    assert open_checkpoint(attempt.run).step == 2


def test_where_a_filesystem_has_no_locks_reading_and_removing_go_on(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    saved_with_metrics(attempt, {1: None, 2: None})
    with CheckpointReader(attempt.run.checkpoints / "step-00000002") as reader:
        reader.verify()
    assert kept(attempt, Retention(keep_last=1)) == [2]


@pytest.mark.cluster
@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.long)])
def test_a_reader_in_a_loop_never_sees_half_a_state_while_saves_and_retention_run(pool: RankPool, attempt: Attempt, seconds: int) -> None:
    save(attempt, 1, keep_last=1)
    loads, newest = 0, 1
    results: list[int] = []

    def save_all_the_time() -> None:
        results.extend(pool.run(2, ranks.save_until, "fsdp2", attempt, seconds, timeout_s=seconds + 200))

    writer = threading.Thread(target=save_all_the_time)
    writer.start()
    while writer.is_alive():
        step, notes, differences = found(attempt.run)
        assert (notes, differences) == ([], [])
        assert step >= newest
        loads, newest = loads + 1, step
        if loads > 5 and newest > 7:
            (attempt.run.path / "enough").touch()
    writer.join()
    saves = results[0]
    print(f"{loads} loads beside {saves} saves in {seconds} s, up to step {newest}")
    assert loads > 5
    assert saves > 5
    # One that was being read when it should have gone stays until the next save.
    assert names(attempt.run)[-1] == f"step-{saves + 1:08d}"
    assert len(names(attempt.run)) <= 3
