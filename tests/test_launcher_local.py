"""The local launcher with real processes and real signals; only the work of a rank is scripted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_end import Quiet, dies_after_a_look

from factory_train.config import Config
from factory_train.errors import ConfigError, PreflightError, UnavailableError
from factory_train.launchers.child import Child
from factory_train.launchers.environment import import_environ
from factory_train.launchers.job import Gang, JobSpec, WorkerEnv
from factory_train.launchers.local import LocalHandle, LocalLauncher
from factory_train.launchers.supervisor import Supervisor
from factory_train.run_dir import Attempt, RunDir, process_started_at

TESTS = Path(__file__).parent
LAUNCHER = LocalLauncher(worker_module="scripted_worker", tracker_module="scripted_tracker", peer_grace_s=0.5, tracker_grace_s=0.5)


@pytest.fixture(autouse=True)
def _scripts_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[..., LocalHandle]]:
    handles = []

    def start(
        script: dict[str, str], *, ranks: int = 2, detach: bool = False, run: str = "run", launcher: LocalLauncher = LAUNCHER, **spec: Any
    ) -> LocalHandle:
        attempt = new_attempt(tmp_path, run)
        environ = {"SCRIPT": json.dumps(script), **spec.pop("environ", {})}
        job = JobSpec(attempt, (Gang("main", 1, ranks),), environ=environ, **spec)
        handles.append(launcher.submit(job, detach=detach))
        return handles[-1]

    yield start
    for handle in handles:
        handle.cancel(now=True)
        assert handle.wait(60)


def new_attempt(root: Path, run: str = "run") -> Attempt:
    return RunDir.create(root, "fake", run).new_attempt(Config(recipe="fake"))


def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def pids(attempt: Attempt, *names: str) -> list[int]:
    """Waits until the named processes have written their pid, and returns them."""
    paths = [attempt.path / f"started-{name}" for name in names]
    return [int(until(lambda path=path: path.is_file() and path.read_text())) for path in paths]


def gone(processes: list[int]) -> bool:
    return all(process_started_at(pid) is None for pid in processes)


def finished(handle: LocalHandle) -> tuple[str, int | None]:
    assert handle.wait(60)
    verdict = handle.attempt.verdict()
    assert verdict is not None
    assert verdict.exit_code == handle.exit_code
    return verdict.outcome, verdict.exit_code


def test_stages_run_in_order_and_the_supervisor_says_done(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({})
    assert finished(handle) == ("done", 0)
    stages = [row["stage"] for row in handle.attempt.events() if row["event"] == "stage-start"]
    assert stages == ["prepare", "train", "finish"]
    for rank in range(2):
        assert f"train rank {rank} of 2 does: ok" in handle.attempt.log_path(f"rank-0000{rank}").read_text()
    assert handle.attempt.error() is None


def test_a_job_started_elsewhere_uninstalled_runs_this_package(
    submit: Callable[..., LocalHandle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stray package of the same name in the working folder must not be picked up.
    (tmp_path / "elsewhere" / "factory_train").mkdir(parents=True)
    (tmp_path / "elsewhere" / "factory_train" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert finished(submit({}, ranks=1)) == ("done", 0)


def test_first_failure_is_recorded_by_the_rank_and_the_hanging_peer_is_ended(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang", "train:1": "raise"})
    assert finished(handle) == ("failed-transient", 1)
    error = handle.attempt.error()
    assert error is not None
    assert (error["rank"], error["hint"]) == (1, "do the other thing")
    verdict = handle.attempt.verdict()
    assert verdict is not None
    assert verdict.reason == "rank 1: ValueError: no such thing"
    assert gone(pids(handle.attempt, "train-0", "train-1"))


def test_a_killed_rank_is_named_with_signal_host_and_hint(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang", "train:1": "killed"})
    assert finished(handle) == ("failed-transient", 1)
    error = handle.attempt.error()
    assert error is not None
    assert (error["rank"], error["signal"], error["stage"]) == (1, "SIGKILL", "train")
    assert "out of memory" in error["hint"]
    assert error["log_tail"][-1] == "train rank 1 of 2 does: killed"
    assert error["log"] == "attempts/0001/logs/rank-00001.log"


def test_a_killed_rank_is_the_cause_even_if_its_peer_complained_first(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "blames-peer", "train:1": "killed-late"})
    assert finished(handle) == ("failed-transient", 1)
    error = handle.attempt.error()
    assert error is not None
    assert (error["rank"], error["signal"]) == (1, "SIGKILL")
    assert error["followed_by"]["rank"] == 0


def test_a_rank_that_dies_while_the_supervisor_looks_is_not_taken_for_done(
    submit: Callable[..., LocalHandle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was alive at one look and gone at the next: the run has failed, whichever look was first."""
    job = submit({}, ranks=1, run="model").job
    monkeypatch.setattr(Child, "running", dies_after_a_look())
    monkeypatch.setenv("SCRIPT", json.dumps({"train:0": "killed"}))
    attempt = new_attempt(tmp_path)
    supervisor = Supervisor(attempt, job | {"stages": ["train"], "environ": {}}, Quiet())
    assert supervisor.run() == 1
    verdict = attempt.verdict()
    assert verdict is not None
    assert verdict.reason == "rank 0: killed by SIGKILL"


def test_a_rank_that_exits_silently_is_reported_with_its_last_words(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:1": "silent", "train:0": "hang"})
    assert finished(handle) == ("failed-transient", 1)
    error = handle.attempt.error()
    assert error is not None
    assert (error["rank"], error["exit_code"], error["log_tail"][-1]) == (1, 17, "the last words")


def test_mistakes_of_the_user_keep_their_exit_code_and_stop_the_stages(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"prepare": "usage"})
    assert finished(handle) == ("failed-user", 2)
    assert not (handle.attempt.path / "started-train-0").exists()


def test_a_failing_finish_stage_is_named(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"finish": "killed"})
    assert finished(handle) == ("failed-transient", 1)
    verdict = handle.attempt.verdict()
    assert verdict is not None
    assert verdict.reason == "stage 'finish': killed by SIGKILL"


def test_a_rank_that_never_ends_after_its_peers_did_is_a_failure(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "ok", "train:1": "hang"}, grace_s=0.5)
    assert finished(handle) == ("failed-transient", 1)
    error = handle.attempt.error()
    assert error is not None
    assert error["rank"] == 1
    assert "rank-00001 did not end within launcher.grace_s=0.5" in error["message"]


@pytest.mark.parametrize(("signum", "outcome", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "preempted", 75)])
def test_a_stop_signal_reaches_every_rank_and_their_verdict_stands(
    submit: Callable[..., LocalHandle], signum: int, outcome: str, code: int
) -> None:
    handle = submit({"train:0": "train", "train:1": "train"})
    pids(handle.attempt, "train-0", "train-1")
    handle.signal(signum)
    assert finished(handle) == (outcome, code)
    verdict = handle.attempt.verdict()
    assert verdict is not None
    assert verdict.reason.startswith("saved at step")


def test_a_stop_before_the_ranks_are_ready_loses_nothing(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang", "train:1": "unready"})
    pids(handle.attempt, "train-0", "train-1")
    handle.signal(signal.SIGTERM)
    assert finished(handle) == ("preempted", 75)


def test_a_stop_during_preparation_ends_it_at_once(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"prepare": "unready"})
    pids(handle.attempt, "prepare-0")
    handle.cancel()
    assert finished(handle) == ("interrupted", 130)


def test_ranks_that_cannot_save_in_time_are_ended(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang", "train:1": "hang"}, grace_s=0.3)
    pids(handle.attempt, "train-0", "train-1")
    handle.signal(signal.SIGTERM)
    assert finished(handle) == ("failed-transient", 1)
    verdict = handle.attempt.verdict()
    assert verdict is not None
    assert "did not save within launcher.grace_s=0.3" in verdict.reason


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_a_second_signal_ends_everything_at_once(submit: Callable[..., LocalHandle], signum: int, code: int) -> None:
    handle = submit({"train:0": "hang", "train:1": "hang"})
    processes = pids(handle.attempt, "train-0", "train-1")
    handle.signal(signum)
    until(lambda: any(row["event"] == "signal" for row in handle.attempt.events()))
    handle.signal(signum)
    assert finished(handle) == ("killed", code)
    assert gone(processes)


def test_another_process_can_attach_and_end_the_job(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "train", "train:1": "train"}, detach=True)
    pids(handle.attempt, "train-0", "train-1")
    other = LAUNCHER.attach(json.loads(handle.attempt.job_path.read_text()))
    assert other.status() == "running"
    assert handle.attempt.log_path("rank-00000") in other.logs()
    other.cancel()
    assert other.wait(60)
    assert finished(handle) == ("interrupted", 130)


def test_a_job_of_another_machine_is_not_touched(submit: Callable[..., LocalHandle]) -> None:
    job = submit({}, ranks=1).to_json() | {"host": "some-other-machine"}
    with pytest.raises(UnavailableError, match="some-other-machine"):
        LAUNCHER.attach(job).cancel()


def test_a_reused_pid_is_not_taken_for_the_job(submit: Callable[..., LocalHandle]) -> None:
    job = submit({}, ranks=1).to_json() | {"pid": os.getpid()}
    assert LAUNCHER.attach(job).status() == "ended"


def test_no_rank_outlives_a_killed_supervisor(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "train", "train:1": "hang-with-child"})
    grandchild = int(until(lambda: (handle.attempt.path / "grandchild").is_file() and (handle.attempt.path / "grandchild").read_text()))
    processes = [*pids(handle.attempt, "train-0", "train-1"), grandchild]
    handle.signal(signal.SIGKILL)
    until(lambda: gone(processes))
    assert handle.attempt.verdict() is None
    assert not handle.attempt.run.is_alive()
    assert handle.wait(60)
    assert handle.exit_code == 1


def test_processes_a_dead_rank_started_are_ended_too(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang-with-child"}, ranks=1)
    grandchild = int(until(lambda: (handle.attempt.path / "grandchild").is_file() and (handle.attempt.path / "grandchild").read_text()))
    os.kill(pids(handle.attempt, "train-0")[0], signal.SIGKILL)
    assert finished(handle) == ("failed-transient", 1)
    until(lambda: gone([grandchild]))


SUBMIT_AND_DIE = """
import json, os, signal, sys
from pathlib import Path
from factory_train.launchers.job import Gang, JobSpec
from factory_train.launchers.local import LocalLauncher
from factory_train.run_dir import Attempt, RunDir
attempt = Attempt(RunDir.open(Path(sys.argv[1])), 1)
environ = {"SCRIPT": json.dumps({"train:0": "train", "train:1": "train"})}
launcher = LocalLauncher(worker_module="scripted_worker")
handle = launcher.submit(JobSpec(attempt, (Gang("main", 1, 2),), environ=environ), detach=sys.argv[2] == "detach")
while not (attempt.path / "started-train-1").exists() or not (attempt.path / "started-train-0").exists():
    handle.wait(0.05)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("mode", ["wait", "detach"])
def test_the_death_of_the_submitter_saves_and_stops_unless_detached(tmp_path: Path, mode: str) -> None:
    attempt = new_attempt(tmp_path)
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    assert subprocess.run([sys.executable, "-c", SUBMIT_AND_DIE, str(attempt.run.path), mode], env=environ).returncode == -signal.SIGKILL
    processes = pids(attempt, "train-0", "train-1")
    handle = LAUNCHER.attach(json.loads(attempt.job_path.read_text()))
    if mode == "detach":
        assert not handle.wait(0.5)
        assert not gone(processes)
        handle.cancel()
    assert handle.wait(60)
    verdict = attempt.verdict()
    assert verdict is not None
    assert verdict.outcome == ("interrupted" if mode == "detach" else "preempted")
    assert gone(processes)


def test_two_jobs_at_once_do_not_touch_each_other(submit: Callable[..., LocalHandle]) -> None:
    one = submit({"train:0": "train", "train:1": "train"}, run="one")
    two = submit({"train:0": "train", "train:1": "killed"}, run="two")
    assert finished(two)[0] == "failed-transient"
    pids(one.attempt, "train-0", "train-1")
    assert one.status() == "running"
    one.cancel()
    assert finished(one) == ("interrupted", 130)


def test_the_syncer_sees_the_verdict_and_cannot_change_it(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({}, ranks=1, tracker=True, launcher=replace(LAUNCHER, tracker_grace_s=60.0))
    assert finished(handle) == ("done", 0)
    assert "saw the verdict" in handle.attempt.log_path("sync").read_text()
    stuck = submit({}, ranks=1, tracker=True, run="stuck", environ={"HANG": "1"})
    assert finished(stuck) == ("done", 0)
    assert "tracker-ended" in [row["event"] for row in stuck.attempt.events()]


def test_a_run_directory_that_fills_up_still_ends_every_process(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "train", "train:1": "hang"})
    processes = pids(handle.attempt, "train-0", "train-1")
    # Neither verdict nor events nor ERROR.json can be written any more, as on a full disk.
    events = handle.attempt.launch / "events.jsonl"
    events.unlink()
    events.mkdir()
    handle.attempt.verdict_path.with_name("attempts-hidden").mkdir()
    hidden = handle.attempt.path.with_name("gone")
    handle.attempt.path.rename(hidden)
    handle.signal(signal.SIGTERM)
    handle.signal(signal.SIGQUIT)
    assert handle.wait(60)
    assert handle.exit_code not in (0, None)
    assert gone(processes)


def test_a_superseded_job_writes_no_verdict_and_says_so(submit: Callable[..., LocalHandle]) -> None:
    handle = submit({"train:0": "hang"}, ranks=1)
    pids(handle.attempt, "train-0")
    handle.attempt.run.new_attempt(Config(recipe="fake"))
    handle.cancel(now=True)
    assert handle.wait(60)
    assert handle.exit_code == 130
    assert handle.attempt.verdict() is None


def test_what_one_machine_cannot_run_is_refused(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    with pytest.raises(ConfigError, match="one machine"):
        LAUNCHER.submit(JobSpec(attempt, (Gang("main", 2, 2),)))
    assert not attempt.job_path.exists()


def test_a_run_directory_that_vanished_is_reported_before_anything_starts(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    attempt.path.rename(tmp_path / "moved")
    with pytest.raises(PreflightError, match="cannot start the job"):
        LAUNCHER.submit(JobSpec(attempt, (Gang("main", 1, 1),)))


def test_a_worker_is_not_told_the_place_of_the_job_around_it() -> None:
    from factory_train.launchers.environment import child_environ

    outer = WorkerEnv("/outer", 7, rank=3, deadline=5.0).to_environ() | {"FACTORY_TRAIN_RUNS": "/runs"}
    inner = WorkerEnv("/inner", 1)
    environ = child_environ(outer, {"MINE": "1"}, inner, one_machine=True)
    assert WorkerEnv.from_environ(environ) == inner
    assert environ["FACTORY_TRAIN_RUNS"] == "/runs"
    assert environ["MINE"] == "1"


def test_a_rank_that_did_its_work_ends_well_whatever_happens_at_interpreter_shutdown() -> None:
    """Seen once: a native thread of torch aborted a rank that had finished ("terminate called without an active exception")."""
    program = "import atexit, os; from factory_train import worker; atexit.register(os.abort); worker.main = lambda argv: 75; worker.run()"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | import_environ(os.environ)).returncode == 75
