"""Nodes that fail the look before a job uses them, on a real Slurm (run with -m long)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
from conftest import REPOSITORY
from slurm_cluster import ended, job_id, nodes, submit, until

from factory_train.launchers.slurm_queue import host_names

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = "train.steps=10"


def ill(*names: str) -> str:
    """Returns the override with which these nodes fail a check of the site's own, and all are spared the one that takes long."""
    tests = " && ".join(f"[ $(hostname -s) != {name} ]" for name in names)
    return f"launcher.setup=[\"export PREFLIGHT_COLLECTIVE=0 PREFLIGHT_COMMAND='{tests}'\"]"


def test_a_bad_node_is_named_and_left_out_of_the_next_attempt(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(tmp_path, "ill", STEPS, "launcher.preflight=true", ill("node2"), "launcher.exclude=node4")
    ended(run)
    first, second = run.attempts()
    assert nodes(run, 1) == ["node1", "node2"]
    assert nodes(run, 2) == ["node1", "node3"]
    error, verdict = first.error(), first.verdict()
    assert error is not None
    assert verdict is not None
    assert (error["host"], verdict.outcome) == ("node2", "failed-transient")
    assert "node2: PREFLIGHT_COMMAND failed" in verdict.reason
    kinds = {event["event"]: event for event in first.events()}
    assert kinds["exclude"]["nodes"] == ["node2"]
    assert list(kinds["preflight"]["bad"]) == ["node2"]
    assert next(event for event in second.events() if event["event"] == "preflight")["bad"] == {}
    said = cluster.slurm("scontrol", "--oneliner", "show", "job", job_id(run)).partition("ExcNodeList=")[2].split()[0]
    assert sorted(host_names(said)) == ["node2", "node4"]
    assert not list((first.path / "logs").glob("rank-*.log")), "no rank started beside a bad node"


def test_the_next_job_of_a_chain_does_without_a_bad_node(cluster: Cluster, tmp_path: Path) -> None:
    words = ("launcher.requeue=chain", "launcher.chain=2")
    run = submit(tmp_path, "chain", STEPS, "launcher.preflight=true", ill("node1"), *words)
    ended(run)
    assert "node1" in nodes(run, 1)
    assert "node1" not in nodes(run, 2)
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())


def test_what_all_nodes_say_is_not_the_fault_of_a_node(cluster: Cluster, tmp_path: Path) -> None:
    run = submit(tmp_path, "all", STEPS, "launcher.preflight=true", ill("node1", "node2"), "launcher.nodelist=node[1-2]")
    ended(run, "failed-user")
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert verdict.exit_code == 3
    until(lambda: not cluster.slurm("squeue", "--noheader").strip())
    assert len(run.attempts()) == 1
    status = command.run("status", run.name, cwd=tmp_path)
    assert "every node says so" in status.stdout


def test_the_script_looks_at_every_node_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    script = str(REPOSITORY / "slurm" / "preflight.sh")
    environ = command.environment() | {"PREFLIGHT_COLLECTIVE": "0"}
    line = ["srun", "--nodes=4", "--ntasks-per-node=1", "bash", script]
    done = subprocess.run([*line, str(tmp_path)], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(text for text in done.stdout.splitlines() if text.endswith(": ok")) == [f"node{number}: ok" for number in range(1, 5)]
    bad = subprocess.run([*line, "/proc"], env=environ, capture_output=True, text=True)
    assert bad.returncode == 1
    assert "node3: BAD /proc cannot be written" in bad.stdout
    # All of it, the collective too.
    line = ["srun", "--nodes=1", "bash", script, str(tmp_path)]
    whole = subprocess.run(line, env=command.environment() | {"PYTHON": sys.executable}, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert "not tried" not in whole.stdout
