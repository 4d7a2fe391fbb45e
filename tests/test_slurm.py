"""Runs on a real Slurm of four nodes: submitted, preempted, and losing a node. More of it: test_slurm_faults.py (-m long)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
import slurm_cluster
from slurm_cluster import ended, losses, nodes, reached, resumed_at, submit

from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
STEPS = "train.steps=120"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_runs")


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> RunDir:
    """A run that nothing happened to."""
    run = submit(folder, "whole", STEPS)
    ended(run)
    return run


def test_four_ranks_on_two_nodes_train_evaluate_and_register(undisturbed: RunDir, folder: Path) -> None:
    assert len(set(nodes(undisturbed, 1))) == 2
    assert list(undisturbed.evaluation.glob("step-00000120.json"))
    assert (undisturbed.export / "config.json").is_file()
    sent = command.run("sync", undisturbed.name, cwd=folder)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    state = json.loads((undisturbed.path / "tracking.json").read_text())
    assert state["registered_version"]
    status = command.run("status", undisturbed.name, cwd=folder)
    assert "done, attempt 1" in status.stdout


def test_the_curve_is_that_of_four_processes_on_one_machine(undisturbed: RunDir, folder: Path) -> None:
    words = ("recipe=llama_fsdp", "launcher=local", "launcher.tasks_per_node=4", "run=local", "data.path=text.txt")
    done = command.run(*words, *slurm_cluster.QUICK, STEPS, "tracking=none", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    local = losses(RunDir.open(folder / "runs" / "llama_fsdp-local"))
    assert local == pytest.approx(losses(undisturbed), rel=1e-5)


def test_the_job_runs_the_code_it_was_submitted_with(undisturbed: RunDir) -> None:
    attempt = undisturbed.attempts()[0]
    script = next(attempt.launch.glob("*_submission.sh")).read_text()
    assert f"PYTHONPATH={attempt.path}/code/tree" in script
    assert (attempt.path / "code" / "tree" / "factory_train" / "launchers" / "slurm.py").is_file()


def test_a_preempted_run_goes_on_bit_for_bit_and_repeats_nothing(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "preempted", STEPS, "launcher.partition=preempt")
    reached(run, 30)
    cluster.slurm("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    ended(run)
    first = run.attempts()[0].verdict()
    assert first is not None
    assert (first.outcome, len(run.attempts())) == ("preempted", 2)
    assert resumed_at(run, 2) == first.step
    assert losses(run) == losses(undisturbed)


def test_a_lost_node_costs_at_most_one_save_interval(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "lost-node", STEPS)
    reached(run, 50)
    lost = nodes(run, 1)[1]
    cluster.script("kill-node", lost, "now")
    try:
        ended(run)
    finally:
        cluster.script("start-node", lost)
    assert lost not in nodes(run, 2)
    reached_before = max(
        row["step"] for row in map(json.loads, run.attempts()[0].metrics_path.read_text().splitlines()) if row["kind"] == "train"
    )
    assert reached_before - resumed_at(run, 2) <= 20 + 1
    assert losses(run) == losses(undisturbed)
