"""Ray inside a Slurm allocation (slurm/ray.sbatch), on a real Slurm of four nodes on this machine (run with -m long)."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
import slurm_cluster
from conftest import REPOSITORY
from ray_cluster import PATIENCE_S
from slurm_cluster import ended, losses, reached, resumed_at, text_file, until

from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
pytest.importorskip("ray")
STEPS = "train.steps=60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_slurm")


def sbatch(cluster: Cluster, folder: Path, *words: str) -> str:
    """Submits the script and returns the job's id."""
    text = text_file(folder)
    settings = {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "RAY_CPUS": "2", "OMP_NUM_THREADS": "1"}
    exports = ",".join(["ALL", *(f"{name}={value}" for name, value in settings.items())])
    options = ("--parsable", "--nodes=2", f"--chdir={folder}", f"--output={folder}/%j.log", f"--export={exports}")
    gang = ("recipe=llama_fsdp", "launcher.tasks_per_node=2", "launcher.fabric=loopback", f"data.path={text}")
    said = cluster.slurm("sbatch", *options, str(REPOSITORY / "slurm" / "ray.sbatch"), *gang, *slurm_cluster.QUICK, *words)
    return said.strip()


def over(cluster: Cluster, folder: Path, job: str) -> str:
    """Waits until a job has ended; returns its state."""

    def state() -> str:
        text = cluster.slurm("scontrol", "--oneliner", "show", "job", job)
        return text.split("JobState=")[1].split()[0]

    until(lambda: state() not in ("PENDING", "RUNNING", "COMPLETING"), about=lambda: (folder / f"{job}.log").read_text()[-3000:])
    return state()


def left_behind(job: str) -> list[str]:
    """Returns the processes that carry a job's mark in their environment or arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environ = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if arguments and f"SLURM_JOB_ID={job}" in environ and int(entry.name) != os.getpid():
            found.append(f"{entry.name} {arguments[:120]}")
    return found


def nothing_is_left(folder: Path, job: str) -> None:
    until(lambda: not left_behind(job), about=lambda: "\n".join(left_behind(job)))
    assert not list(folder.glob(f".ray-{job}-*"))


def test_the_curve_is_that_of_slurm_and_of_one_machine_and_nothing_is_left(cluster: Cluster, folder: Path) -> None:
    job = sbatch(cluster, folder, STEPS)
    assert over(cluster, folder, job) == "COMPLETED", (folder / f"{job}.log").read_text()
    run = RunDir.open(folder / "runs" / f"llama_fsdp-job{job}")
    nothing_is_left(folder, job)
    words = ("recipe=llama_fsdp", "launcher=local", "launcher.tasks_per_node=4", "run=local", "data.path=text.txt")
    done = command.run(*words, *slurm_cluster.QUICK, STEPS, "tracking=none", cwd=folder, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    by_slurm = slurm_cluster.submit(folder, "slurm", STEPS)
    ended(by_slurm)
    for other in (by_slurm, RunDir.open(folder / "runs" / "llama_fsdp-local")):
        assert losses(run) == pytest.approx(losses(other), rel=1e-5)


def test_after_a_failure_nothing_is_left(cluster: Cluster, folder: Path) -> None:
    job = sbatch(cluster, folder, STEPS, "launcher.tasks_per_node=3")
    assert over(cluster, folder, job) == "FAILED"
    assert "are needed, and the cluster has" in (folder / f"{job}.log").read_text()
    nothing_is_left(folder, job)


def test_after_a_cancel_nothing_is_left(cluster: Cluster, folder: Path) -> None:
    job = sbatch(cluster, folder, "train.steps=2000")
    run = folder / "runs" / f"llama_fsdp-job{job}"
    until(lambda: (run / "run.json").exists(), about=lambda: (folder / f"{job}.log").read_text()[-3000:])
    reached(RunDir.open(run), 20)
    cluster.slurm("scancel", job)
    assert over(cluster, folder, job) == "CANCELLED"
    nothing_is_left(folder, job)


def test_a_requeued_job_saves_first_and_goes_on_in_the_same_run(cluster: Cluster, folder: Path) -> None:
    job = sbatch(cluster, folder, "train.steps=400")
    run = folder / "runs" / f"llama_fsdp-job{job}"
    until(lambda: (run / "run.json").exists(), about=lambda: (folder / f"{job}.log").read_text()[-3000:])
    reached(RunDir.open(run), 20)
    cluster.slurm("scancel", "--batch", "--signal=TERM", job)
    until(lambda: RunDir.open(run).attempts()[0].verdict())
    verdict = RunDir.open(run).attempts()[0].verdict()
    assert verdict is not None
    assert (verdict.outcome, verdict.exit_code) == ("preempted", 75)
    until(lambda: "Restarts=1" in cluster.slurm("scontrol", "--oneliner", "show", "job", job))
    assert over(cluster, folder, job) == "COMPLETED", (folder / f"{job}.log").read_text()
    assert resumed_at(RunDir.open(run), 2) == verdict.step
    ended(RunDir.open(run))
    nothing_is_left(folder, job)
