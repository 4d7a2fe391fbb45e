"""Disks that are full, read-only or closed to us: training goes on, what was saved stays, the next save works."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoint_ranks as ranks
import command
import psutil
import pytest
from checkpoint_cases import Bench, found, history, names, next_attempt, tree, until

from factory_train.checkpoint.files import DurableFiles
from factory_train.errors import CheckpointError
from factory_train.run_dir import Attempt, RunDir

NOBODY = 65534


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """Mounts a small tmpfs, or skips the test."""
    path.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs (run the tests as root): {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the room there is."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    return filler


def seconds_used(pid: int) -> float:
    """Returns the processor time that the processes below one have taken."""
    total = 0.0
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total


def one_lost_save(bench: Bench, attempt: Attempt, break_it: Callable[[], object], mend_it: Callable[[], object], word: str) -> None:
    """Saves while something is broken, and again when it is mended."""
    before = tree(attempt.run)
    break_it()
    try:
        bench.begin(3)
        with pytest.raises(CheckpointError, match=word):
            bench.saver.finish()
        assert {name: data for name, data in tree(attempt.run).items() if ".tmp-" not in name} == before
        assert found(attempt.run) == (2, [], [])
    finally:
        mend_it()
    bench.save(4)
    assert [kind for kind, _ in bench.events] == ["checkpoint-failed", "checkpoint"]
    assert found(attempt.run) == (4, [], [])
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000004"]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_full_disk_costs_one_save(tmp_path: Path, mode: str) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        attempt = next_attempt(history(disk))
        bench = Bench(attempt, mode=mode)
        with contextlib.closing(bench.saver):
            one_lost_save(bench, attempt, lambda: fill(disk), lambda: (disk / "filler").unlink(), "No space left on device")
        assert bench.events[0][1]["fix"] == "free space on that filesystem"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_that_is_read_only_for_a_while_costs_one_save(tmp_path: Path, mode: str) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        attempt = next_attempt(history(disk))
        bench = Bench(attempt, mode=mode)

        def remount(option: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)

        with contextlib.closing(bench.saver):
            one_lost_save(bench, attempt, lambda: remount("ro"), lambda: remount("rw"), "Read-only file system")


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_folder_whose_permission_is_lost_costs_one_save(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, mode: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another user takes root (run the tests as root)")
    attempt = next_attempt(history(tmp_path))
    # pytest keeps its folders to the user who runs it.
    top = tmp_path_factory.getbasetemp().parent
    for folder in (path for path in (tmp_path, *tmp_path.parents) if path.is_relative_to(top)):
        folder.chmod(folder.stat().st_mode | 0o055)
    for path in [attempt.run.path, *attempt.run.path.rglob("*")]:
        os.chown(path, NOBODY, NOBODY)
    bench = Bench(attempt, mode=mode)
    # A writer process of another user could not even start a Python that lives in root's home.
    bench.saver._start_writer = lambda arena: ranks.ThreadWriter(arena, DurableFiles())

    def locked(yes: bool) -> None:
        os.seteuid(0)
        attempt.run.checkpoints.chmod(0o555 if yes else 0o755)
        os.seteuid(NOBODY)

    os.seteuid(NOBODY)
    try:
        one_lost_save(bench, attempt, lambda: locked(True), lambda: locked(False), "Permission denied")
    finally:
        os.seteuid(0)
        bench.saver.close()


@pytest.mark.cluster
@pytest.mark.long
def test_a_disk_that_is_full_for_a_while_ends_no_run_and_loses_no_row(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    with small_disk(tmp_path / "disk", "90m") as disk:
        words = ("recipe=llama_fsdp", "run=full", "runs_root=disk", "data.path=text.txt", *command.SMALL, "tracking=none")
        more = ("train.steps=100000", "checkpoint.every_steps=20", "train.validate_every=0", "optim.schedule=constant")
        process = command.start(*words, *more, "launcher.tasks_per_node=2", "train.log_every=100000", cwd=tmp_path)
        run = RunDir(disk / "llama_fsdp-full")

        def events(kind: str) -> list[int]:
            assert process.poll() is None, process.communicate()
            attempt = run.last_attempt() if (run.path / "attempts").is_dir() else None
            return [event["step"] for event in (attempt.events() if attempt else []) if event["event"] == kind]

        until(lambda: len(events("checkpoint")) >= 2, 120)
        filler = fill(disk)
        # Long enough for several saves, however little of a busy machine it gets.
        used = seconds_used(process.pid)
        until(lambda: seconds_used(process.pid) > used + 3.0, 120)
        last = events("checkpoint")[-1]
        filler.unlink()
        # What could not be told while the disk was full is told now.
        until(lambda: events("checkpoint-failed") and events("checkpoint")[-1] > max(last, *events("checkpoint-failed")), 120)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, out + err
        assert "training goes on: " in out
        attempt = run.last_attempt()
        assert attempt is not None
        verdict = attempt.verdict()
        assert verdict is not None
        assert [row["step"] for row in run.metrics() if row["kind"] == "train"] == list(range(1, (verdict.step or 0) + 1))
