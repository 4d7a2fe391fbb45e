"""Runs inside an allocation that is there already: on all of its nodes, on a real Slurm (run with -m long)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from conftest import REPOSITORY
from slurm_cluster import QUICK, ended, losses, nodes, reached, submit, text_file, until

from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = "train.steps=120"
ENTER = ("salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2", "--time=10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("allocation")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> RunDir:
    run = submit(folder, "whole", STEPS)
    ended(run)
    return run


def start(folder: Path, name: str, *words: str) -> subprocess.Popen[str]:
    """Starts a run in an allocation of two nodes; `launcher` is left to its default, auto."""
    train = (sys.executable, "-m", "factory_train", "recipe=llama_fsdp", "launcher.fabric=loopback", f"run={name}", "tracking=none")
    line = [*ENTER, *train, f"data.path={text_file(folder)}", *QUICK, *words]
    return subprocess.Popen(line, cwd=folder, env=command.environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_the_whole_allocation_is_used_and_the_curve_is_that_of_a_job(undisturbed: RunDir, folder: Path) -> None:
    process = start(folder, "inside", STEPS)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "allocation (inside allocation" in out
    run = RunDir.open(folder / "runs" / "llama_fsdp-inside")
    assert len(nodes(run, 1)) == 2
    assert len(list((run.attempts()[0].path / "logs").glob("rank-*.log"))) == 4
    assert losses(run) == losses(undisturbed)


def test_what_a_person_stops_is_saved_and_leaves_other_steps_alone(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    process = start(folder, "interrupted", STEPS)
    run_path = folder / "runs" / "llama_fsdp-interrupted"
    until(lambda: (run_path / "run.json").is_file() and (run_path / "attempts" / "0001" / "job.json").is_file())
    run = RunDir.open(run_path)
    allocation = run.attempts()[0].job_path.read_text().partition('"job_id": "')[2].partition('"')[0]
    beside = subprocess.Popen(["srun", f"--jobid={allocation}", "--overlap", "--nodes=1", "--ntasks=1", "sleep", "8"])
    reached(run, 20)
    stopped = command.run("stop", run.name, cwd=folder)
    assert "interrupted" in stopped.stdout, stopped.stdout + stopped.stderr
    assert beside.wait(timeout=120) == 0
    process.communicate(timeout=120)
    assert process.returncode == 130
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert verdict.step is not None
    # Goes on in another allocation, and is not stopped by what stopped it before.
    again = start(folder, "interrupted", STEPS)
    out, _ = again.communicate(timeout=300)
    assert again.returncode == 0, out
    assert losses(run) == losses(undisturbed)


def test_ranks_do_not_outlive_the_command_that_started_them(cluster: Cluster, folder: Path) -> None:
    process = start(folder, "orphans", "train.steps=4000")
    run_path = folder / "runs" / "llama_fsdp-orphans"
    until(lambda: (run_path / "attempts" / "0001" / "metrics.jsonl").is_file())
    run = RunDir.open(run_path)
    reached(run, 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    verdict = until(lambda: run.attempts()[0].verdict())
    assert verdict.outcome in ("preempted", "failed-transient")
    process.communicate(timeout=120)
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())


def test_the_script_for_sbatch_trains_on_two_nodes_and_requeues_itself(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    environ = command.environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    words = ["recipe=llama_fsdp", "launcher.fabric=loopback", "tracking=none", f"data.path={text_file(folder)}", *QUICK, STEPS]
    script = str(REPOSITORY / "slurm" / "train.sbatch")
    line = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", "--time=30", script, *words, "launcher.tasks_per_node=2"]
    job = subprocess.run(line, cwd=folder, env=environ, text=True, capture_output=True, check=True).stdout.strip()
    run_path = folder / "runs" / f"llama_fsdp-job{job}"
    until(lambda: (run_path / "attempts" / "0001" / "job.json").is_file())
    run = RunDir.open(run_path)
    reached(run, 30)
    # As Slurm itself does before the limit.
    cluster.slurm("scancel", "--batch", "--signal=TERM", job)
    until(lambda: len(run.attempts()) == 2, about=lambda: (folder / f"slurm-{job}.out").read_text())
    ended(run)
    first = run.attempts()[0].verdict()
    assert first is not None
    assert first.outcome == "preempted"
    assert [len(nodes(run, attempt)) for attempt in (1, 2)] == [2, 2]
    assert losses(run) == losses(undisturbed)
