"""Islands on Slurm without a Slurm: which nodes and cards are whose, what is submitted, and when a run of several jobs has ended."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import command
import pytest
import torch.distributed as dist
from conftest import REPOSITORY

from factory_train import storage
from factory_train.config import LauncherConfig
from factory_train.distributed.gloo_wire import listen_where_others_are
from factory_train.errors import ConfigError
from factory_train.gangs import island_names, island_run
from factory_train.launchers import slurm_island_jobs, slurm_queue, slurm_script
from factory_train.launchers.allocation import Allocation, fill_in
from factory_train.launchers.job import Gang, JobSpec
from factory_train.launchers.slurm import SlurmHandle
from factory_train.launchers.slurm_islands import Share, own_cards, shares, step_spec, whole
from factory_train.launchers.slurm_queue import QueuedJob
from factory_train.run_dir import Attempt, Verdict

GOLDEN = Path(__file__).parent / "golden"
NODES = [f"node{number}" for number in range(1, 9)]


def gangs(count: int, nodes: int, tasks: int) -> tuple[Gang, ...]:
    return tuple(Gang(name, nodes, tasks) for name in island_names(count))


@pytest.mark.parametrize("how", ["one", "separate"])
def test_a_dry_run_prints_the_scripts_where_there_is_no_slurm(how: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(subprocess.__file__).read_text())
    words = ("recipe=llama_diloco", "launcher=slurm", f"launcher.island_jobs={how}", "launcher.nodes=2", "diloco.fragments=2")
    environ = command.environment() | {"PATH": "/nowhere"}
    environ.pop("SLURM_CONF", None)
    line = [sys.executable, "-m", "factory_train", *words, "run=golden", "tracking=none", f"data.path={text}", *command.SMALL, "--dry-run"]
    done = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = done.stdout[done.stdout.index("slurm: sbatch") :]
    for found, name in ((str(tmp_path), "WORK"), (sys.executable, "PYTHON"), (str(REPOSITORY), "CLONE")):
        script = script.replace(found, name)
    script = "\n".join(line.rstrip() for line in script.splitlines()) + "\n"
    assert script == (GOLDEN / f"slurm_islands_{how}.txt").read_text()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("count", "nodes", "together", "asked"),
    [(2, 2, 1, (4, 3)), (4, 1, 2, (2, 6)), (3, 1, 2, (2, 6)), (2, 1, 4, (1, 6)), (1, 2, 1, (2, 3))],
)
def test_a_job_has_room_for_all_islands(count: int, nodes: int, together: int, asked: tuple[int, int]) -> None:
    found = whole(gangs(count, nodes, 3), together)
    assert (found.nodes, found.tasks_per_node) == asked
    given = shares(count, nodes, together, NODES[: found.nodes])
    assert {node for share in given for node in share.nodes} == set(NODES[: found.nodes])
    places = [(node, share.place) for share in given for node in share.nodes]
    assert len(set(places)) == len(places) == count * nodes
    assert all(share.place < share.of <= together for share in given)


def test_islands_that_share_a_node_share_its_cards_and_cores() -> None:
    assert [own_cards("0,1,2,3", share, 2) for share in ([0, 2], [1, 2])] == ["0,1", "2,3"]
    # Slurm's numbers need not begin at zero.
    assert own_cards("4,5,6,7", [1, 2], 2) == "6,7"
    assert own_cards("0,1", [0, 1], 2) is None
    assert own_cards("0", [1, 2], 1) is None, "fewer cards than ranks: all share what there is"
    assert own_cards(None, [1, 2], 2) is None
    spec = {"gang": {}, "cpus_per_task": 3, "tasks_per_node": 4, "srun_args": [], "container": None, "python": "python3"}
    gang = {"name": "island-1", "nodes": 1, "tasks_per_node": 2}
    line = slurm_script.stage_command(step_spec(spec, gang, Share(("node1",), 1, 2)), "train", nodes=1, tasks_per_node=2)
    assert {"--cpus-per-task=6", "--cpu-bind=none", "--overlap", "--nodelist=node1"} <= set(line)


def test_islands_inside_an_allocation_share_its_nodes() -> None:
    allocation = Allocation("7", tuple(NODES[:4]), 4, None)
    assert fill_in(LauncherConfig(), allocation, 2) == {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": None}
    assert fill_in(LauncherConfig(islands_per_node=2), allocation, 4) == {"nodes": 2, "tasks_per_node": 2, "gpus_per_node": None}
    with pytest.raises(ConfigError, match=r"3 nodes for each of 2 islands, and allocation 7 has 4\n.*launcher\.nodes=2"):
        fill_in(LauncherConfig(nodes=3), allocation, 2)
    with pytest.raises(ConfigError, match=r"launcher\.islands_per_node=2"):
        fill_in(LauncherConfig(), allocation, 6)


@pytest.mark.parametrize(("key", "value"), [("islands_per_node", 2), ("nodelist", "node1"), ("then", ["export"])])
def test_what_cannot_be_with_a_job_an_island_is_refused(key: str, value: object) -> None:
    options = replace(LauncherConfig(island_jobs="separate"), **{key: value})
    with pytest.raises(ConfigError, match=rf"launcher\.{key}"):
        slurm_script.check(options)
    slurm_script.check(replace(options, island_jobs="one"))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, QueuedJob]:
    """What squeue says."""
    jobs: dict[str, QueuedJob] = {}
    monkeypatch.setattr(slurm_queue, "my_jobs", lambda: jobs)
    return jobs


def job(job_id: str, state: str) -> QueuedJob:
    return QueuedJob(job_id, state, "None", "", "N/A")


def test_what_one_island_does_for_all_is_done_by_one_whose_job_runs(attempt: Attempt, queue: dict[str, QueuedJob]) -> None:
    queue |= {"1": job("1", "RUNNING"), "2": job("2", "RUNNING")}
    first, second = (slurm_island_jobs.Claims(attempt, job_id) for job_id in ("1", "2"))
    assert first.take("finish")
    assert not second.take("finish")
    assert second.take("sync"), "another thing"
    assert first.take("finish"), "after a requeue it is still its own"
    queue["1"] = job("1", "PENDING")
    assert second.take("finish"), "a job that was preempted does not keep the others waiting"
    queue["1"] = job("1", "RUNNING")
    assert not first.take("finish")
    del queue["2"]
    assert first.take("finish"), "a job that Slurm has forgotten"


@pytest.fixture
def apart(attempt: Attempt) -> Attempt:
    """A run whose two islands are jobs of their own."""
    spec = JobSpec(attempt, gangs(2, 1, 2), options=LauncherConfig(island_jobs="separate"))
    assert slurm_island_jobs.are_meant(spec)
    coming = slurm_island_jobs.next_attempts(spec)
    parts = slurm_island_jobs.new_attempts(spec)
    assert coming == parts
    islands = {part.run.name: {"attempt": 1, "job_id": str(index), "job_ids": [str(index)]} for index, part in enumerate(parts)}
    facts = {"launcher": "slurm", "job_id": "0", "job_ids": ["0", "1"], "run_dir": str(attempt.run.path), "attempt": 1}
    storage.write_json(attempt.job_path, facts | {"islands": islands})
    return attempt


def over(main: Attempt, island: str, outcome: str, code: int = 0, step: int | None = 5) -> None:
    of_island = island_run(main.run, island).attempts()[-1]
    slurm_island_jobs.write_over(main, of_island, Verdict(outcome, code, step, f"{outcome} it is", 0.0))


@pytest.mark.parametrize(
    ("outcomes", "whole"),
    [
        (("done", "done"), "done"),
        (("interrupted", "preempted"), "interrupted"),
        (("done", "failed-transient"), "failed-transient"),
        (("failed-transient", "failed-user"), "failed-user"),
        (("killed", "interrupted"), "killed"),
    ],
)
def test_the_last_island_ends_the_run(apart: Attempt, outcomes: tuple[str, str], whole: str) -> None:
    failed = island_run(apart.run, "island-1").attempts()[-1]
    failed.record_error({"rank": 1, "message": "had enough", "stage": "train"})
    over(apart, "island-0", outcomes[0], step=7)
    assert apart.verdict() is None, "the other one goes on"
    over(apart, "island-1", outcomes[1])
    verdict = apart.verdict()
    assert verdict is not None
    assert (verdict.outcome, verdict.step) == (whole, 7)
    error = apart.error()
    assert (error is not None) == outcomes[1].startswith("failed")
    if error is not None:
        assert (error["message"], error["log"]) == ("island-1: had enough", "gangs/island-1/attempts/0001/logs/rank-00001.log")


def test_stopping_a_run_of_two_jobs_takes_one_out_of_the_queue_and_asks_the_other(
    apart: Attempt, queue: dict[str, QueuedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue |= {"0": job("0", "RUNNING"), "1": job("1", "PENDING")}
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm_queue, "run", lambda *words: asked.append(words) or "")
    handle = SlurmHandle(storage.read_json(apart.job_path))
    handle.cancel()
    assert asked == [("scancel", "--signal=INT", "0"), ("scancel", "1")]
    assert apart.verdict() is None
    over(apart, "island-0", "interrupted", 130)
    verdict = apart.verdict()
    assert verdict is not None
    assert verdict.outcome == "interrupted"


def test_a_run_that_is_done_leaves_no_island_in_the_queue(
    apart: Attempt, queue: dict[str, QueuedJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue |= {"0": job("0", "RUNNING"), "1": job("1", "PENDING")}
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm_queue, "run", lambda *words: asked.append(words) or "")
    slurm_island_jobs.conclude(apart, 9)
    assert asked == [("scancel", "1")]
    verdict = apart.verdict()
    assert verdict is not None
    assert (verdict.outcome, verdict.step) == ("done", 9)


def test_gloo_listens_where_islands_on_other_machines_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that it is put back whatever is set below.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    here = dist.HashStore()
    here.set("host/1", socket.gethostname())
    listen_where_others_are(here, 0, 2)
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "on one machine the default will do"
    apart = dist.HashStore()
    apart.set("host/1", "127.0.0.1")
    listen_where_others_are(apart, 0, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    listen_where_others_are(apart, 0, 2)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
