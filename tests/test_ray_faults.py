"""What can happen to a run on Ray, done to it: every scenario takes about a minute (run with -m long)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command
import psutil
import pytest
from mlflow_server import holds_one_run_with_every_step, mlflow_server
from ray_cluster import GANG, PATIENCE_S, Cluster, kill, nothing_is_left, processes, start_event, submit
from slurm_cluster import QUICK, ended, losses, reached, resumed_at, text_file, until

from factory_train.run_dir import RunDir

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = "train.steps=120"
# With a save at every other step there is always one under way.
SAVING = "checkpoint.every_steps=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_faults")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder, nodes=3) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> RunDir:
    run = submit(folder, "whole", STEPS)
    ended(run)
    return run


def a_worker(run: RunDir, cluster: Cluster) -> None:
    kill(processes(run, "factory_train.worker")[-1])


def an_agent(run: RunDir, cluster: Cluster) -> None:
    kill(psutil.Process(processes(run, "factory_train.worker")[-1]).ppid())


def the_driver(run: RunDir, cluster: Cluster) -> None:
    kill(processes(run, "factory_train.launchers.ray_driver")[0])


def a_node(run: RunDir, cluster: Cluster) -> None:
    cluster.kill_node(start_event(run, 1)["node_ids"][1])
    cluster.add_node()


@pytest.mark.parametrize("when", ["mid_step", "mid_save"])
@pytest.mark.parametrize("kill_it", [a_worker, an_agent, the_driver, a_node])
def test_what_is_killed_is_replaced_and_the_curve_is_bit_identical(
    cluster: Cluster, undisturbed: RunDir, folder: Path, kill_it: Callable[[RunDir, Cluster], None], when: str
) -> None:
    run = submit(folder, f"{kill_it.__name__}-{when}", STEPS, *([SAVING] if when == "mid_save" else []))
    reached(run, 50)
    kill_it(run, cluster)
    ended(run)
    outcomes = [verdict.outcome for attempt in run.attempts() if (verdict := attempt.verdict())]
    assert outcomes == ["failed-transient", "done"]
    assert losses(run) == losses(undisturbed)
    assert resumed_at(run, 2) >= (40 if when == "mid_step" else 46)
    told = {event["event"]: event for event in run.attempts()[0].events()}
    first = run.attempts()[0].verdict()
    assert first is not None
    assert first.step is not None
    # A save that was under way may be committed by its own process after the attempt was given up: then less is repeated.
    saved_later = 0 if when == "mid_step" else 2
    assert 0 <= told["restart"]["steps_to_repeat"] - (first.step - resumed_at(run, 2)) <= saved_later
    assert told["start"]["node_ids"]
    nothing_is_left(run)


@pytest.mark.parametrize("kill_it", [a_worker, the_driver])
def test_what_was_killed_is_one_run_in_mlflow_with_every_step(
    cluster: Cluster, tmp_path: Path, kill_it: Callable[[RunDir, Cluster], None]
) -> None:
    with mlflow_server(tmp_path) as uri:
        run = submit(tmp_path, "sent", "train.steps=100", f"tracking.uri={uri}", "tracking.sync_every_s=1")
        reached(run, 30)
        kill_it(run, cluster)
        ended(run)
        assert len(run.attempts()) == 2
        holds_one_run_with_every_step(uri, run, 100)


@pytest.mark.parametrize("when", ["mid_step", "mid_save"])
def test_a_drained_node_is_left_after_a_save_and_no_step_is_done_twice(
    cluster: Cluster, undisturbed: RunDir, folder: Path, when: str
) -> None:
    run = submit(folder, f"drained-{when}", STEPS, *([SAVING] if when == "mid_save" else []))
    reached(run, 40)
    drained = start_event(run, 1)["node_ids"][1]
    cluster.drain_node(drained)
    ended(run)
    first = run.attempts()[0].verdict()
    assert first is not None
    assert (first.outcome, len(run.attempts())) == ("preempted", 2)
    assert resumed_at(run, 2) == first.step
    assert drained not in start_event(run, 2)["node_ids"]
    assert losses(run) == losses(undisturbed)
    cluster.kill_node(drained)
    cluster.add_node()


@pytest.mark.parametrize("whom", ["rank", "agent"])
def test_a_notice_to_one_process_saves_first(cluster: Cluster, undisturbed: RunDir, folder: Path, whom: str) -> None:
    run = submit(folder, f"notice-{whom}", STEPS)
    reached(run, 40)
    rank = processes(run, "factory_train.worker")[-1]
    os.kill(rank if whom == "rank" else psutil.Process(rank).ppid(), signal.SIGTERM)
    ended(run)
    first = run.attempts()[0].verdict()
    assert first is not None
    assert (first.outcome, resumed_at(run, 2)) == ("preempted", first.step)
    assert losses(run) == losses(undisturbed)


def test_with_fewer_nodes_back_it_goes_on_smaller_and_sees_the_same_samples(cluster: Cluster, folder: Path) -> None:
    exact = ("train.steps=60", "precision.params=float64", "precision.compute=float64", "precision.reduce=float64")
    whole = submit(folder, "elastic-whole", *exact)
    ended(whole)
    run = submit(folder, "elastic", *exact, "launcher.elastic.min_nodes=1", "launcher.elastic.wait_s=2")
    reached(run, 41)
    used = start_event(run, 1)["node_ids"]
    spare = [node.node_id for node in cluster.nodes if node.node_id not in used]
    for node_id in [*spare, used[1]]:
        cluster.kill_node(node_id)
    try:
        ended(run)
    finally:
        for _ in range(2):
            cluster.add_node()
    assert len(start_event(run, 2)["node_ids"]) == 1
    assert any(event["event"] == "elastic" for event in run.attempts()[1].events())
    # Forty steps were on two nodes, and twenty are on one.
    assert resumed_at(run, 2) == 40
    assert hashes(run) == hashes(whole)
    found, expected = losses(run), losses(whole)
    assert max(abs(found[step] - expected[step]) for step in range(1, 61)) <= 1e-10


def hashes(run: RunDir) -> list[tuple[int, Any]]:
    return [(row["step"], row["data_hash"]) for row in run.metrics() if row["kind"] == "train"]


def test_the_submitting_process_may_die_right_after_submitting(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    words = (*GANG, "run=orphan", f"data.path={text_file(folder)}", *QUICK, STEPS, "wait=true")
    process = command.start(*words, cwd=folder)
    path = folder / "runs" / "llama_fsdp-orphan"
    until(lambda: (path / "attempts" / "0001" / "job.json").exists() and cluster.api.jobs())
    run = RunDir.open(path)
    until(lambda: any(run.name in job["submission_id"] for job in cluster.api.jobs()))
    process.kill()
    process.communicate()
    reached(run, 5)
    followed = command.run("logs", "-f", run.name, cwd=folder, timeout_s=PATIENCE_S)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    ended(run)
    assert losses(run) == losses(undisturbed)


def test_two_jobs_at_once_do_not_interfere(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    cluster.add_node()
    runs = [submit(folder, f"side-{number}", STEPS) for number in (1, 2)]
    for run in runs:
        ended(run)
        assert losses(run) == losses(undisturbed)
    assert not set(start_event(runs[0], 1)["node_ids"]) & set(start_event(runs[1], 1)["node_ids"])


def test_the_points_of_a_sweep_share_the_cluster(cluster: Cluster, folder: Path) -> None:
    words = ("recipe=llama_fsdp", "launcher=ray", "launcher.tasks_per_node=2", "launcher.sweep_parallel=2", "sweep=shared")
    points = ("-m", "optim.lr=1e-3,3e-3,1e-2", f"data.path={text_file(folder)}", *QUICK, "train.steps=30")
    done = command.run(*words, *points, cwd=folder, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [RunDir.open(folder / "runs" / f"llama_fsdp-shared-{number:02d}") for number in (1, 2, 3)]
    spans = []
    for run in runs:
        verdict = run.attempts()[0].verdict()
        assert verdict is not None
        assert verdict.outcome == "done"
        spans.append((start_event(run, 1)["time"], verdict.time))
    for begin, _ in spans:
        assert sum(first <= begin < last for first, last in spans) <= 2
    assert (folder / "runs" / "sweep-llama_fsdp-shared" / "table.csv").exists()


def test_stop_now_ends_it_without_saving(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "now", STEPS)
    reached(run, 30)
    done = command.run("stop", run.name, "--now", cwd=folder)
    assert "killed" in done.stdout, done.stdout + done.stderr
    nothing_is_left(run)


def test_a_mistake_is_not_tried_again_and_a_bug_three_times(cluster: Cluster, folder: Path) -> None:
    from test_slurm_faults import PLUGIN

    (folder / "failing_losses.py").write_text(PLUGIN)
    for loss, outcome, attempts in (("mistake", "failed-user", 1), ("bug", "failed-transient", 3)):
        run = submit(folder, loss, STEPS, "plugins=[failing_losses]", f"train.loss={loss}")
        until(lambda run=run, attempts=attempts: len(run.attempts()) == attempts)
        ended(run, outcome)
        until(lambda run=run: not processes(run, "factory_train.launchers.ray_entry"))
        assert len(run.attempts()) == attempts
        status = command.run("status", run.name, cwd=folder)
        assert "rank 1 had enough" in status.stdout


def test_the_head_may_go_away_and_resume_goes_on_elsewhere(tmp_path: Path, undisturbed: RunDir) -> None:
    """In a process of its own: Ray's settings are read once a process."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import command
from ray_cluster import PATIENCE_S, Cluster, nothing_is_left, submit
from slurm_cluster import ended, reached, until
folder = Path({str(tmp_path)!r})
with Cluster(folder) as cluster:
    run = submit(folder, "headless", "{STEPS}")
    reached(run, 50)
    cluster.ray.remove_node(cluster.ray.head_node, allow_graceful=False)
    nothing_is_left(run)
with Cluster(folder) as cluster:
    # A run whose processes died without a word counts as alive for a minute.
    until(lambda: not run.is_alive())
    words = ("resume", run.name, "wait=true", f"launcher.address={{cluster.address}}")
    done = command.run(*words, cwd=folder, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    ended(run)
"""
    environ = command.environment()
    environ.pop("RAY_API_SERVER_ADDRESS", None)
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir.open(tmp_path / "runs" / "llama_fsdp-headless")
    assert losses(run) == losses(undisturbed)


def test_a_cluster_of_our_own_comes_with_the_first_job_and_goes_after_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: RunDir
) -> None:
    home = Path("/tmp") / f"ray-own-{os.getpid()}"
    monkeypatch.setenv("FACTORY_TRAIN_RAY", str(home))
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    words = ("recipe=llama_fsdp", "launcher=ray", "launcher.address=local", "launcher.tasks_per_node=2", "run=own", "wait=true")
    done = command.run(*words, f"data.path={text_file(tmp_path)}", *QUICK, "train.steps=30", cwd=tmp_path, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    known = json.loads((home / "cluster.json").read_text())
    assert known["address"].startswith("http://127.0.0.1:")
    assert (home / "token").stat().st_mode & 0o777 == 0o600
    keeper = psutil.Process(known["pid"])
    family = [keeper, *keeper.children(recursive=True)]
    port = int(known["address"].rpartition(":")[2])
    listening = [c.laddr for process in family for c in process.net_connections() if c.status == "LISTEN"]
    assert [address.ip for address in listening if address.port == port] == ["127.0.0.1"]
    assert "takes jobs from anybody" not in done.stderr
    keeper.terminate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert not (home / "cluster.json").exists()
    shutil.rmtree(home)
