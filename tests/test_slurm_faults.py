"""What can happen to a run on Slurm, done to it: every scenario takes about a minute (run with -m long)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from conftest import REPOSITORY
from slurm_cluster import GANG, QUICK, ended, job_id, losses, nodes, reached, resumed_at, submit, text_file, until, workers

from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = "train.steps=120"

PLUGIN = """
import os
import torch
from factory_train.errors import DataError
from factory_train.loss import summed_cross_entropy
from factory_train.registries import LOSSES

CALLS = [0]

def failing(error):
    def loss(logits, targets):
        CALLS[0] += 1
        if CALLS[0] == 5 and os.environ["FACTORY_TRAIN_RANK"] == "1":
            raise error("rank 1 had enough")
        return summed_cross_entropy(logits, targets)
    return loss

LOSSES.register("bug")(failing(ValueError))
LOSSES.register("mistake")(failing(DataError))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_faults")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> RunDir:
    run = submit(folder, "whole", STEPS)
    ended(run)
    return run


def check_nothing_was_repeated(run: RunDir, undisturbed: RunDir) -> None:
    ended(run)
    verdicts = [attempt.verdict() for attempt in run.attempts()]
    assert [verdict.outcome for verdict in verdicts if verdict] == ["preempted", "done"]
    assert resumed_at(run, 2) == (verdicts[0].step if verdicts[0] else None)
    assert losses(run) == losses(undisturbed)


def test_scontrol_requeue(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    """Somebody who follows the log of a rank sees the second attempt too, and is let go at the end."""
    run = submit(folder, "requeue", STEPS)
    reached(run, 30)
    following = command.start("logs", "-f", run.name, "--rank", "3", cwd=folder)
    cluster.slurm("scontrol", "requeue", job_id(run))
    check_nothing_was_repeated(run, undisturbed)
    shown, _ = following.communicate(timeout=120)
    assert following.returncode == 0
    assert "--- attempt 2 ---" in shown


def test_a_signal_to_the_process_of_one_rank(undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "one-rank", STEPS)
    reached(run, 30)
    os.kill(workers(run)[3], signal.SIGUSR2)
    check_nothing_was_repeated(run, undisturbed)


def test_two_signals_in_a_row(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "two-signals", STEPS)
    reached(run, 30)
    for name in ("USR2", "TERM"):
        cluster.slurm("scancel", f"--signal={name}", job_id(run))
    check_nothing_was_repeated(run, undisturbed)


def test_a_signal_during_a_save(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    # With a save at every other step there is always one under way.
    run = submit(folder, "in-save", STEPS, "checkpoint.every_steps=2")
    reached(run, 31)
    cluster.slurm("scancel", "--signal=USR2", job_id(run))
    check_nothing_was_repeated(run, undisturbed)


def test_a_signal_before_the_first_step(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "early", STEPS)
    until(lambda: len(workers(run)) == 4)
    cluster.slurm("scancel", "--signal=USR2", job_id(run))
    check_nothing_was_repeated(run, undisturbed)


def test_a_signal_in_the_last_step(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "last", STEPS)
    reached(run, 117)
    subprocess.run(["scancel", "--signal=USR2", job_id(run)], check=False)
    ended(run)
    assert losses(run) == losses(undisturbed)


def test_the_time_limit(cluster: Cluster, folder: Path) -> None:
    words = ("train.steps=500", "launcher.time=1")
    run = submit(folder, "limit", *words)
    ended(run, timeout_s=600)
    attempts = run.attempts()
    assert len(attempts) > 1
    for before, after in itertools.pairwise(attempts):
        verdict = before.verdict()
        assert verdict is not None
        # Slurm looks at limits every half minute, so its warning may come before the deadline is near, or behind the last step.
        assert any(words in verdict.reason for words in ("time limit", "SIGUSR2", "by a signal in stage")), verdict.reason
        # One whose last step is done has only its end left.
        assert verdict.step == 500 or resumed_at(run, after.number) == verdict.step
    assert sorted(losses(run)) == list(range(1, 501))
    whole = submit(folder, "no-limit", "train.steps=500")
    ended(whole, timeout_s=400)
    assert losses(run) == losses(whole)


def test_a_gang_whose_slurmd_died_is_replaced_and_commits_nothing_more(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "zombie", "train.steps=600", "launcher.nodes=1", "checkpoint.every_steps=5")
    reached(run, 30)
    node = nodes(run, 1)[0]
    old = workers(run)
    state = Path(cluster.conf).parent.parent
    os.kill(int((state / "run" / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
    cluster.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    try:
        reached(run, 1, attempt=2)
        began = next(event["time"] for event in run.attempts()[1].events() if event["event"] == "start")
        late = [event for event in run.attempts()[0].events() if event["event"] == "checkpoint" and event["time"] > began + 0.5]
        assert not late
        ended(run)
        verdict = run.attempts()[0].verdict()
        assert verdict is None or verdict.outcome == "failed-transient"
        until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in old.values()))
    finally:
        (state / "run" / f"slurmd-{node}.pid").unlink(missing_ok=True)
        cluster.script("start-node", node)
    assert sorted(losses(run)) == list(range(1, 601))


def test_a_rank_that_hangs_is_named_and_replaced(undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "hang", STEPS, "launcher.hang_s=15")
    reached(run, 30)
    os.kill(workers(run)[2], signal.SIGSTOP)
    ended(run)
    error, verdict = run.attempts()[0].error(), run.attempts()[0].verdict()
    assert error is not None
    assert verdict is not None
    assert error["rank"] == 2
    assert (verdict.outcome, "rank 2" in verdict.reason) == ("failed-transient", True)
    assert losses(run) == losses(undisturbed)


def test_a_rank_that_vanishes_is_named_and_replaced(undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "vanish", STEPS)
    reached(run, 30)
    os.kill(workers(run)[1], signal.SIGKILL)
    ended(run)
    error = run.attempts()[0].error()
    assert error is not None
    assert (error["rank"], error["signal"]) == (1, "SIGKILL")
    assert losses(run) == losses(undisturbed)


@pytest.mark.parametrize(("loss", "outcome", "attempts"), [("mistake", "failed-user", 1), ("bug", "failed-transient", 3)])
def test_a_rank_that_raises_is_named_and_not_tried_for_ever(cluster: Cluster, folder: Path, loss: str, outcome: str, attempts: int) -> None:
    (folder / "failing_losses.py").write_text(PLUGIN)
    run = submit(folder, loss, STEPS, "plugins=[failing_losses]", f"train.loss={loss}")
    until(lambda: len(run.attempts()) == attempts)
    ended(run, outcome)
    time.sleep(3)
    assert job_id(run) not in cluster.slurm("squeue", "--noheader", "--format=%i").split()
    assert len(run.attempts()) == attempts
    status = command.run("status", run.name, cwd=folder)
    assert "first failure: rank 1 on node" in status.stdout
    assert "rank 1 had enough" in status.stdout


def test_what_is_edited_between_submit_and_start_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    """From inside a clone, whose files are in the working directory of the job."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns(".git", "runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
    shutil.copytree(REPOSITORY, clone, symlinks=True, ignore=ignore)
    text = text_file(tmp_path)
    words = (
        *GANG,
        "run=frozen",
        f"data.path={text}",
        *QUICK,
        "train.steps=10",
        'launcher.extra=["hold"]',
        f"runs_root={tmp_path / 'runs'}",
    )
    environ = command.environment() | {"PYTHONPATH": str(clone)}
    done = subprocess.run([sys.executable, "-m", "factory_train", *words], cwd=clone, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (clone / "factory_train" / "trainer.py").write_text("raise SystemExit('edited')\n")
    (clone / "launchers" / "slurm_batch.py").write_text("raise SystemExit('edited')\n")
    (clone / "configs" / "recipe" / "llama_fsdp.yaml").write_text("nonsense: true\n")
    run = RunDir.open(tmp_path / "runs" / "llama_fsdp-frozen")
    status = subprocess.run(
        [sys.executable, "-m", "factory_train", "status", str(run.path)],
        cwd=tmp_path,
        env=command.environment(),
        capture_output=True,
        text=True,
    )
    assert "JobHeldUser" in status.stdout, status.stdout + status.stderr
    cluster.slurm("scontrol", "release", job_id(run))
    ended(run)


def test_stop_saves_and_does_not_requeue_and_resume_goes_on(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "stopped", STEPS)
    reached(run, 20)
    done = command.run("stop", run.name, cwd=folder)
    assert "interrupted" in done.stdout, done.stdout + done.stderr
    assert not cluster.slurm("squeue", "--noheader").strip()
    resumed = command.run("resume", run.name, "wait=true", cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert losses(run) == losses(undisturbed)


def test_a_job_that_waits_is_taken_out_of_the_queue_by_stop(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "waiting", STEPS, 'launcher.extra=["hold"]')
    again = command.run(*GANG, "run=waiting", f"data.path={text_file(folder)}", *QUICK, STEPS, cwd=folder)
    assert again.returncode == 3
    done = command.run("stop", run.name, cwd=folder)
    assert "taken out of the queue" in done.stdout
    assert not cluster.slurm("squeue", "--noheader").strip()


def test_a_save_switch_saves_and_training_goes_on(undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "switch", "train.steps=400", "checkpoint.every_steps=400")
    reached(run, 20)
    (run.path / "switches").mkdir(exist_ok=True)
    (run.path / "switches" / "save").touch()
    until(lambda: any(event["event"] == "checkpoint" and event["step"] < 400 for event in run.attempts()[0].events()))
    ended(run)
    assert len(run.attempts()) == 1
    assert not (run.path / "switches" / "save").exists()


def test_a_stop_switch_saves_and_ends_the_run(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "touched", "train.steps=4000")
    reached(run, 20)
    (run.path / "switches").mkdir(exist_ok=True)
    (run.path / "switches" / "stop").touch()
    ended(run, "interrupted")
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert (run.checkpoints / f"step-{verdict.step:08d}").is_dir()
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())
    assert len(run.attempts()) == 1


def test_a_chain_goes_on_where_requeue_is_not_wanted(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "chain", STEPS, "launcher.requeue=chain", "launcher.chain=2")
    reached(run, 30)
    cluster.slurm("scancel", "--signal=USR2", job_id(run))
    check_nothing_was_repeated(run, undisturbed)
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())


def test_jobs_that_follow_start_when_the_run_has_ended_well(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "followed", "train.steps=10", "launcher.then=[evaluate]")
    job = json.loads(run.attempts()[0].job_path.read_text())["then"]["evaluate"]
    ended(run)
    until(lambda: "JobState=COMPLETED" in cluster.slurm("scontrol", "--oneliner", "show", "job", job))
