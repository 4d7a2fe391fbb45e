"""Sweeps on a real Slurm: one job array, every point an ordinary run (run with -m long)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from slurm_cluster import QUICK, ended, job_id, reached, text_file, until

from factory_train.run_dir import RunDir
from factory_train.sweep import SweepDir
from factory_train.sweep_results import read_results

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
WORDS = ("recipe=llama_fsdp", "launcher=slurm", "launcher.tasks_per_node=1", "launcher.fabric=loopback", *QUICK)
GRID = ("-m", "optim.lr=1e-3,2e-3,3e-3", "train.seed=1,2", "launcher.sweep_parallel=2")


def points(folder: Path, name: str, count: int) -> list[RunDir]:
    return [RunDir.open(folder / "runs" / f"llama_fsdp-{name}-{number:02d}") for number in range(1, count + 1)]


def test_a_grid_is_one_array_and_what_happens_to_a_point_happens_to_no_other(cluster: Cluster, tmp_path: Path) -> None:
    """Of six points one is requeued, two are stopped by name, one is cancelled by its element."""
    words = (*WORDS, *GRID, "sweep=grid", "train.steps=1000", "checkpoint.every_steps=250", f"data.path={text_file(tmp_path)}")
    submitted = command.run(*words, cwd=tmp_path)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    runs = points(tmp_path, "grid", 6)
    ids = [job_id(run) for run in runs]
    (array,) = {element.partition("_")[0] for element in ids}
    assert ids == [f"{array}_{number}" for number in range(1, 7)]
    assert "ArrayTaskThrottle=2" in cluster.slurm("scontrol", "--oneliner", "show", "job", array)
    assert len({str(run.attempts()[0].path.joinpath("code", "tree").resolve()) for run in runs}) == 1

    status = command.run("status", cwd=tmp_path).stdout
    assert all(re.search(rf"^{run.name} .* {array}_{number} ", status, re.MULTILINE) for number, run in enumerate(runs, start=1)), status
    stopped = command.run("stop", runs[5].name, cwd=tmp_path)
    assert "taken out of the queue" in stopped.stdout, stopped.stdout + stopped.stderr
    cluster.slurm("scancel", ids[4])
    reached(runs[0], 20)
    running = cluster.slurm("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
    assert 1 <= len(running) <= 2
    cluster.slurm("scontrol", "requeue", ids[0])
    reached(runs[1], 20)
    stopped = command.run("stop", runs[1].name, cwd=tmp_path)
    assert "interrupted by the user; saved at step" in stopped.stdout, stopped.stdout + stopped.stderr

    for run in (runs[0], *runs[2:4]):
        ended(run, timeout_s=300)
    assert [len(run.attempts()) for run in runs] == [2, 1, 1, 1, 1, 1]
    first = runs[0].attempts()[0].verdict()
    assert first is not None
    assert first.outcome == "preempted"
    start = json.loads(runs[0].attempts()[1].metrics_path.read_text().splitlines()[0])
    assert start["step"] == first.step
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())

    report = command.run("report", "grid", cwd=tmp_path)
    assert report.returncode == 0, report.stdout + report.stderr
    assert "3 done" in report.stdout
    sweep = SweepDir(tmp_path / "runs" / "sweep-llama_fsdp-grid")
    states = {result.point.number: result.state for result in read_results(sweep).points}
    assert states == {1: "done", 2: "interrupted", 3: "done", 4: "done", 5: "lost", 6: "interrupted"}

    log = command.run("logs", runs[0].name, cwd=tmp_path)
    assert log.returncode == 0, log.stdout + log.stderr
    resumed = command.run("resume", runs[5].name, "wait=true", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    # The same command goes on with what is left, as an array of what is left.
    again = command.run(*words, "wait=true", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 4
    assert "6 done" in again.stdout


def test_an_array_that_is_refused_leaves_nothing_behind(cluster: Cluster, tmp_path: Path) -> None:
    words = (*WORDS, *GRID, "sweep=refused", "launcher.partition=nope", "train.steps=10", f"data.path={text_file(tmp_path)}")
    done = command.run(*words, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "error: launcher.partition: Slurm refused the job" in done.stderr
    assert not [entry.name for entry in (tmp_path / "runs").iterdir() if not entry.name.startswith(".")]
    assert not cluster.slurm("squeue", "--noheader").strip()
