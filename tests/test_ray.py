"""Runs on a real Ray cluster of two nodes and a head: submitted, waiting, stopped, losing a node. More: test_ray_faults.py (-m long)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import command
import pytest
from mlflow_runs import check_one_run
from ray_cluster import GANG, PATIENCE_S, Cluster, environ_of, nothing_is_left, processes, start_event, submit
from slurm_cluster import QUICK, ended, losses, reached, resumed_at, text_file, until

from factory_train.run_dir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
STEPS = "train.steps=60"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_runs")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, folder: Path) -> RunDir:
    """A run that nothing happened to."""
    run = submit(folder, "whole", STEPS)
    ended(run)
    return run


def test_four_ranks_on_two_nodes_train_evaluate_and_register(undisturbed: RunDir, folder: Path) -> None:
    assert len(set(start_event(undisturbed, 1)["node_ids"])) == 2
    assert list(undisturbed.evaluation.glob("step-00000060.json"))
    assert (undisturbed.export / "config.json").is_file()
    sent = command.run("sync", undisturbed.name, cwd=folder)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert json.loads((undisturbed.path / "tracking.json").read_text())["registered_version"]
    status = command.run("status", undisturbed.name, cwd=folder)
    assert "done, attempt 1" in status.stdout
    nothing_is_left(undisturbed)


def test_the_curve_is_that_of_four_processes_on_one_machine(undisturbed: RunDir, folder: Path) -> None:
    words = ("recipe=llama_fsdp", "launcher=local", "launcher.tasks_per_node=4", "run=local", "data.path=text.txt")
    done = command.run(*words, *QUICK, STEPS, "tracking=none", cwd=folder, timeout_s=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    local = losses(RunDir.open(folder / "runs" / "llama_fsdp-local"))
    assert local == pytest.approx(losses(undisturbed), rel=1e-5)


def test_the_job_runs_the_code_it_was_submitted_with(undisturbed: RunDir, cluster: Cluster) -> None:
    attempt = undisturbed.attempts()[0]
    (job,) = [job for job in cluster.api.jobs() if job["metadata"].get("run_dir") == str(undisturbed.path)]
    assert f"cd {attempt.path}/code/tree && exec " in job["entrypoint"]
    assert job["runtime_env"]["env_vars"]["PYTHONPATH"].startswith(f"{attempt.path}/code/tree")
    assert "token" not in json.dumps(job["runtime_env"])


def test_what_can_never_be_placed_is_refused_with_what_would_fit(cluster: Cluster, folder: Path) -> None:
    for words, fix in ((("launcher.nodes=5",), "launcher.nodes=2"), (("launcher.tasks_per_node=3",), "launcher.tasks_per_node=2")):
        done = command.run(*GANG, *words, "run=large", f"data.path={text_file(folder)}", *QUICK, cwd=folder)
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"fix: {fix}" in done.stderr
        assert not (folder / "runs" / "llama_fsdp-large").exists()


@pytest.mark.parametrize("found", ["no token", "another token"])
def test_a_cluster_with_a_token_takes_nothing_from_who_does_not_have_it(
    cluster: Cluster, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    token = tmp_path / "token"
    if found == "another token":
        token.write_text("u" * 64)
        token.chmod(0o600)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    done = command.run(*GANG, "run=stranger", f"data.path={text_file(folder)}", *QUICK, cwd=folder)
    assert done.returncode == 77, done.stdout + done.stderr
    assert "fix: " in done.stderr
    assert not (folder / "runs" / "llama_fsdp-stranger").exists()


@pytest.mark.long
def test_a_second_job_waits_and_says_so_and_stop_and_resume_work_from_a_new_shell(
    cluster: Cluster, undisturbed: RunDir, folder: Path
) -> None:
    first = submit(folder, "first", STEPS, "launcher.gpus_per_node=2", "hardware=cpu")
    until(lambda: any(event["event"] == "start" for event in first.attempts()[0].events()))
    second = submit(folder, "second", STEPS)
    until(lambda: "it waits for other jobs" in command.run("status", second.name, cwd=folder).stdout)
    table = command.run("status", cwd=folder).stdout
    assert "PENDING" in table
    stopped = command.run("stop", second.name, cwd=folder)
    assert "interrupted: stopped while it waited for room" in stopped.stdout, stopped.stdout + stopped.stderr
    reached(first, 5)
    ranks = [environ_of(pid) for pid in processes(first, "factory_train.worker")]
    places = sorted((rank["FACTORY_TRAIN_RANK"], rank["FACTORY_TRAIN_LOCAL_RANK"], rank["CUDA_VISIBLE_DEVICES"]) for rank in ranks)
    assert places == [("0", "0", "0,1"), ("1", "1", "0,1"), ("2", "0", "0,1"), ("3", "1", "0,1")]
    stopped = command.run("stop", first.name, cwd=folder)
    assert "interrupted" in stopped.stdout, stopped.stdout + stopped.stderr
    verdict = first.attempts()[0].verdict()
    assert verdict is not None
    resumed = command.run("resume", first.name, "wait=true", cwd=folder, timeout_s=PATIENCE_S)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert resumed_at(first, 2) == verdict.step
    assert losses(first) == losses(undisturbed)


def test_a_lost_node_costs_at_most_one_save_interval_and_fewer_nodes_go_on(cluster: Cluster, undisturbed: RunDir, folder: Path) -> None:
    run = submit(folder, "lost-node", STEPS, "launcher.elastic.min_nodes=1", "launcher.elastic.wait_s=1")
    reached(run, 30)
    lost = start_event(run, 1)["node_ids"][1]
    cluster.kill_node(lost)
    ended(run)
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert (verdict.outcome, "was lost" in verdict.reason) == ("failed-transient", True)
    assert len(start_event(run, 2)["node_ids"]) == 1
    assert (verdict.step or 0) - resumed_at(run, 2) <= 20 + 1
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    check_one_run(run, folder, 60)
    nothing_is_left(run)
