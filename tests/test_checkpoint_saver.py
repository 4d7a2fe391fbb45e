"""Saving beside training: real writer processes, state that changes meanwhile, writers that die, attempts that are overtaken."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import checkpoint_ranks as ranks
import pytest
import torch
from checkpoint_cases import Bench, found, history, names, new_run, next_attempt, save, tree, until
from conftest import REPOSITORY
from rank_pool import RankPool

from factory_train.checkpoint.arena import Arena
from factory_train.errors import CheckpointError, FencedError
from factory_train.run_dir import Attempt, process_started_at

TESTS = Path(__file__).parent


@pytest.fixture
def bench(attempt: Attempt) -> Iterator[Bench]:
    bench = Bench(attempt)
    with contextlib.closing(bench.saver):
        yield bench


@pytest.fixture
def slow(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench whose writer takes about two seconds for a save."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(REPOSITORY)]))
    bench = Bench(attempt, "slow_writer")
    with contextlib.closing(bench.saver):
        yield bench


def writing(attempt: Attempt) -> bool:
    return any(attempt.run.checkpoints.glob("step-*.tmp-*/rank-*.safetensors"))


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["ddp2", "fsdp4", "hsdp4"])
def test_what_changes_after_an_asynchronous_save_began_is_not_in_it(pool: RankPool, attempt: Attempt, strategy: str) -> None:
    world = ranks.STRATEGIES[strategy]
    events = pool.run(world, ranks.save_three_beside, strategy, attempt)
    assert [(kind, facts["step"]) for kind, facts in events[0]] == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)]
    assert events[1:] == [[]] * (world - 1)
    assert found(attempt.run) == (3, [], [])
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000003"]
    assert pool.run(world, ranks.load_notes, strategy, attempt.run) == [(3, [], [])] * world


def test_begin_does_not_wait_for_the_disk_and_the_next_save_does(
    slow: Bench, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    monkeypatch.setenv("HOLD_WRITER", str(hold))
    slow.begin(1)
    assert slow.saver.progress() == (False, False)
    assert slow.kinds() == []
    hold.unlink()
    slow.saver.take_stall_s()
    slow.begin(2)
    # Never two at once: the first is whole before the second begins.
    assert slow.kinds() == [("checkpoint", 1)]
    assert found(attempt.run) == (1, [], [])
    assert slow.saver.take_stall_s() > 0.5
    assert slow.saver.take_stall_s() == 0.0
    slow.saver.finish()
    assert found(attempt.run) == (2, [], [])


def test_progress_rides_along_until_the_commit_is_ordered_and_done(bench: Bench, attempt: Attempt) -> None:
    bench.begin(5)
    until(lambda: bench.saver.progress() == (True, False))
    # What the reduction of the very step said that was saved is about an earlier save.
    bench.saver.agreed(5, 1, 0)
    assert bench.saver.progress() == (True, False)
    bench.saver.agreed(6, 1, 0)
    until(lambda: bench.saver.progress() == (False, False) and bench.kinds() == [("checkpoint", 5)])
    (_, facts) = bench.events[0]
    assert (facts["path"], facts["mode"]) == ("step-00000005", "async")
    assert facts["num_bytes"] == sum(path.stat().st_size for path in (attempt.run.checkpoints / "step-00000005").glob("[rs]*"))
    assert found(attempt.run) == (5, [], [])


def test_a_killed_writer_costs_one_checkpoint_and_the_next_save_works(slow: Bench, attempt: Attempt) -> None:
    slow.save(1)
    slow.begin(2)
    until(lambda: writing(attempt))
    os.kill(slow.writers[0].pid, signal.SIGKILL)
    until(lambda: slow.saver.progress() == (False, True))
    slow.saver.agreed(3, 0, 1)
    (kind, facts) = slow.events[-1]
    assert (kind, facts["step"]) == ("checkpoint-failed", 2)
    assert "SIGKILL" in facts["message"]
    # The space is given back at once.
    assert names(attempt.run) == ["latest", "step-00000001"]
    slow.save(4)
    assert slow.kinds() == [("checkpoint", 1), ("checkpoint-failed", 2), ("checkpoint", 4)]
    assert found(attempt.run) == (4, [], [])


def test_a_last_save_that_failed_is_an_error_and_can_be_tried_again(slow: Bench, attempt: Attempt) -> None:
    slow.begin(1)
    until(lambda: writing(attempt))
    os.kill(slow.writers[0].pid, signal.SIGKILL)
    with pytest.raises(CheckpointError, match="SIGKILL"):
        slow.saver.finish()
    slow.save(1)
    assert found(attempt.run) == (1, [], [])


@pytest.mark.cluster
def test_a_failure_on_one_rank_is_the_same_on_all_and_named_in_the_event(pool: RankPool, attempt: Attempt) -> None:
    results = pool.run(4, ranks.save_beside_with_failure, "ddp4", attempt, 2)
    raised, events = [error for error, _ in results], results[0][1]
    assert len(set(raised)) == 1
    assert "rank 2" in raised[0]
    assert "No space left" in raised[0]
    assert [(kind, facts["step"]) for kind, facts in events] == [("checkpoint-failed", 1), ("checkpoint", 2)]
    assert events[0][1]["fix"] == "free space on that filesystem"
    assert found(attempt.run) == (2, [], [])


def test_an_overtaken_attempt_commits_moves_and_deletes_nothing(tmp_path: Path) -> None:
    attempt = history(tmp_path)
    before = tree(attempt.run)
    bench = Bench(attempt, keep_last=1)
    with contextlib.closing(bench.saver):
        bench.begin(3)
        until(lambda: bench.saver.progress() == (True, False))
        next_attempt(attempt)
        with pytest.raises(FencedError):
            bench.saver.finish()
        with pytest.raises(FencedError):
            bench.save(4)
    assert {name: data for name, data in tree(attempt.run).items() if ".tmp-" not in name} == before
    assert found(attempt.run) == (2, [], [])


def test_a_lost_node_that_wakes_up_in_mid_save_changes_nothing(slow: Bench, attempt: Attempt) -> None:
    save(attempt, 1)
    slow.begin(2)
    until(lambda: writing(attempt))
    # The node hangs: neither the rank nor its writer does anything until the job has long been restarted elsewhere.
    os.kill(slow.writers[0].pid, signal.SIGSTOP)
    later = next_attempt(attempt)
    save(later, 2, seed=22)
    save(later, 3, seed=33)
    before = tree(attempt.run)
    os.kill(slow.writers[0].pid, signal.SIGCONT)
    with pytest.raises((FencedError, CheckpointError)):
        slow.saver.finish()
    assert tree(attempt.run) == before
    assert found(attempt.run) == (3, [], [])


def test_a_writer_outlives_neither_its_rank_nor_a_stop_signal_too_many(tmp_path: Path) -> None:
    attempt = new_run(tmp_path)
    program = """
import sys, time
from pathlib import Path
import checkpoint_ranks as ranks
from factory_train.run_dir import Attempt, RunDir
from checkpoint_cases import Bench
bench = Bench(Attempt(RunDir(Path(sys.argv[1])), 1), "slow_writer")
bench.begin(1)
print(bench.writers[0].pid, flush=True)
time.sleep(60)
"""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(REPOSITORY)])}
    rank = subprocess.Popen([sys.executable, "-c", program, str(attempt.run.path)], env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        writer = int(rank.stdout.readline())
        # Schedulers send these to every process of a job; only the rank knows what to do with them.
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            os.kill(writer, signum)
        time.sleep(0.2)
        assert process_started_at(writer) is not None
    finally:
        rank.kill()
        rank.communicate()
    until(lambda: process_started_at(writer) is None)
    save(next_attempt(attempt), 2)
    assert found(attempt.run) == (2, [], [])
    assert not [name for name in names(attempt.run) if ".tmp-" in name]


def test_synchronous_saves_report_in_the_same_way(attempt: Attempt) -> None:
    bench = Bench(attempt, mode="sync")
    bench.begin(1)
    assert bench.kinds() == [("checkpoint", 1)]
    assert bench.saver.take_stall_s() > 0
    assert bench.saver.progress() == (False, False)
    bench.saver.finish()
    assert bench.writers == []
    assert found(attempt.run) == (1, [], [])


@pytest.mark.parametrize("value", [torch.zeros(2), float("nan")])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_state_that_json_cannot_hold_costs_one_save(attempt: Attempt, mode: str, value: object) -> None:
    bench = Bench(attempt, mode=mode)
    with contextlib.closing(bench.saver):
        bench.saver.begin(1, ranks.entries_of(ranks.spread_state("single", ranks.reference(1))), {"cursor": value})
        bench.saver.before_update()
        with pytest.raises(CheckpointError, match="JSON"):
            bench.saver.finish()
        bench.save(2)
    assert bench.kinds() == [("checkpoint-failed", 1), ("checkpoint", 2)]


def test_memory_that_cannot_be_had_costs_saves_and_not_the_run(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(size: int) -> Arena:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    bench = Bench(attempt)
    with contextlib.closing(bench.saver):
        with monkeypatch.context() as patch:
            patch.setattr(Arena, "make", staticmethod(none_left))
            bench.saver.prepare(ranks.entries_of(ranks.spread_state("single", ranks.reference(1))))
            bench.begin(1)
            with pytest.raises(CheckpointError, match="Cannot allocate memory"):
                bench.saver.finish()
        bench.save(2)
    assert found(attempt.run) == (2, [], [])
