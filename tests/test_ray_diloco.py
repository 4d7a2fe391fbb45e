"""Islands on a real Ray cluster: a placement group each. The curve in every run of the tests; what can happen to islands with -m long."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import psutil
import pytest
from island_runs import check_agreement, check_same, is_member, num_attempts, step_of, told_by_all
from mlflow_runs import check_one_run
from ray_cluster import Cluster, kill, nothing_is_left, processes, start_event
from slurm_cluster import QUICK, ended, text_file, until

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.gangs import island_names, island_run
from factory_train.run_dir import RunDir

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ISLANDS = island_names(2)
# Islands of one rank, each with a node to itself.
SINGLE = ("launcher.tasks_per_node=1", "launcher.cpus_per_task=2")
ENDLESS = "train.steps=100000"


def words(name: str, *more: str) -> tuple[str, ...]:
    exchange = ("diloco.islands=2", "diloco.fragments=2", "diloco.sync_every=8", "diloco.silence_s=3", "diloco.grace_s=60")
    return ("recipe=llama_diloco", f"run={name}", "data.path=text.txt", *QUICK, *exchange, *more)


def submit(folder: Path, name: str, *more: str) -> RunDir:
    text_file(folder)
    done = command.run(*words(name, "launcher=ray", "launcher.fabric=loopback", *more), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs" / f"llama_diloco-{name}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ray_islands")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with Cluster(folder, nodes=3) as cluster:
        yield cluster


def test_two_islands_compute_what_they_do_on_one_machine(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "whole", "launcher.tasks_per_node=2", "train.steps=40")
    local = command.run(*words("local", "launcher=local", "launcher.tasks_per_node=2", "train.steps=40", "tracking=none"), cwd=folder)
    assert local.returncode == 0, local.stdout + local.stderr
    ended(run)
    check_same(run, RunDir.open(folder / "runs" / "llama_diloco-local"))
    check_agreement(run, 40)
    places = [start_event(island_run(run, island), 1)["node_ids"] for island in ISLANDS]
    assert [len(nodes) for nodes in places] == [1, 1]
    assert places[0] != places[1]
    assert list(run.evaluation.glob("step-00000040.json"))
    assert (run.export / "config.json").is_file()
    status = command.run("status", run.name, cwd=folder).stdout
    assert "island-1 left at step 40" in status
    assert "done, attempt 1" in status
    assert command.run("logs", run.name, "--island", "1", "--rank", "1", cwd=folder).returncode == 0
    gone(run)


def gone(run: RunDir) -> None:
    """Waits until no process of a run and of its islands is there any more."""
    for home in (run, *(island_run(run, island) for island in ISLANDS)):
        nothing_is_left(home)


def training(run: RunDir, above: int = 30) -> None:
    """Waits until both islands train."""
    until(lambda: all(step_of(run, island) > above and is_member(run, island) for island in ISLANDS), 180, lambda: told_by_all(run))


def back(run: RunDir, island: str, before: int) -> None:
    """Waits until an island that was started `before` times is there again."""
    until(lambda: num_attempts(run, island) > before and is_member(run, island), 180, lambda: told_by_all(run))


def concluded(run: RunDir, folder: Path) -> None:
    """Stops a run from another shell, resumes it for forty steps, and checks the end that it comes to, and its place in MLflow."""
    stopped = command.run("stop", run.name, cwd=folder)
    assert "interrupted" in stopped.stdout, stopped.stdout + stopped.stderr + told_by_all(run)
    last = max(step_of(run, island) for island in ISLANDS) + 40
    resumed = command.run("resume", run.name, f"train.steps={last}", "wait=true", cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr + told_by_all(run)
    check_agreement(run, last)
    assert [path.name for path in run.evaluation.glob("*.json")] == [f"step-{last:08d}.json"]
    gone(run)
    check_one_run(run, folder, last)


def a_worker(run: RunDir, cluster: Cluster) -> None:
    kill(processes(island_run(run, "island-1"), "factory_train.worker")[0])


def its_driver(run: RunDir, cluster: Cluster) -> None:
    kill(processes(island_run(run, "island-1"), "factory_train.launchers.ray_driver")[0])


def its_agent(run: RunDir, cluster: Cluster) -> None:
    kill(psutil.Process(processes(island_run(run, "island-1"), "factory_train.worker")[0]).ppid())


def its_node(run: RunDir, cluster: Cluster) -> None:
    cluster.kill_node(node_of(run, "island-1"))
    cluster.add_node()


def node_of(run: RunDir, island: str) -> str:
    """Returns the node of an island that has one."""
    return str(start_event(island_run(run, island), num_attempts(run, island))["node_ids"][0])


@pytest.mark.long
def test_a_killed_island_returns_while_the_other_goes_on(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "killed", *SINGLE, ENDLESS)
    faults: list[Callable[[RunDir, Cluster], None]] = [a_worker, its_driver, its_agent, its_node]
    for number, fault in enumerate(faults, 1):
        # A save later than the last fault: an attempt without one counts as fruitless.
        training(run, step_of(run, "island-0") + 40)
        fault(run, cluster)
        back(run, "island-1", number)
        verdict = island_run(run, "island-1").attempts()[number - 1].verdict()
        assert verdict is not None
        assert verdict.outcome == "failed-transient"
    assert num_attempts(run, "island-0") == 1
    assert len(run.attempts()) == 1
    # It was there all the time, and made every step once.
    steps = [row["step"] for row in island_run(run, "island-0").metrics() if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    concluded(run, folder)


@pytest.mark.long
def test_an_island_leaves_a_drained_node_after_a_save_and_the_other_goes_on(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "drained", *SINGLE, ENDLESS)
    training(run)
    drained = node_of(run, "island-1")
    cluster.drain_node(drained)
    back(run, "island-1", 1)
    first = island_run(run, "island-1").attempts()[0].verdict()
    assert first is not None
    assert first.outcome == "preempted"
    assert node_of(run, "island-1") != drained
    assert num_attempts(run, "island-0") == 1
    concluded(run, folder)
    cluster.kill_node(drained)
    cluster.add_node()


@pytest.mark.long
def test_all_islands_begin_together_after_their_driver_died_and_save_when_the_job_is_told(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "driver", *SINGLE, ENDLESS)
    training(run)
    kill(processes(run, "factory_train.launchers.ray_driver")[0])
    for island in ISLANDS:
        back(run, island, 1)
    assert len(run.attempts()) == 2
    os.kill(processes(run, "factory_train.launchers.ray_entry")[0], signal.SIGTERM)
    ended(run, "preempted")
    gone(run)
    for island in ISLANDS:
        verdict = island_run(run, island).attempts()[-1].verdict()
        assert verdict is not None
        assert verdict.outcome == "preempted"
        assert verdict.step is not None
        assert list_checkpoints(island_run(run, island))[0].step == verdict.step
    assert len(run.attempts()) == 2


@pytest.mark.long
def test_a_job_begins_when_all_its_islands_have_a_place(cluster: Cluster, folder: Path) -> None:
    """Three nodes, and two jobs of two islands: one of them has both, the other none."""
    first = submit(folder, "first", *SINGLE, ENDLESS)
    training(first)
    second = submit(folder, "second", *SINGLE, "train.steps=40")
    waits = "2 islands of 1 node with 2 CPU are needed; they are not free together: it waits for other jobs"
    until(lambda: waits in command.run("status", second.name, cwd=folder).stdout, 60)
    assert num_attempts(second, "island-0") == 0
    stopped = command.run("stop", first.name, cwd=folder)
    assert "interrupted" in stopped.stdout, stopped.stdout + stopped.stderr
    ended(second)
    check_agreement(second, 40)


@pytest.mark.long
def test_an_island_without_room_waits_and_the_other_goes_on(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "no-room", *SINGLE, ENDLESS)
    training(run)
    stays = node_of(run, "island-1")
    gone_nodes = [node.node_id for node in cluster.nodes if node.node_id != stays]
    for node_id in gone_nodes:
        cluster.kill_node(node_id)
    until(lambda: "island-0 waits (" in command.run("status", run.name, cwd=folder).stdout, 120, lambda: told_by_all(run))
    before = step_of(run, "island-1")
    until(lambda: step_of(run, "island-1") > before + 50, 120, lambda: told_by_all(run))
    for _ in gone_nodes:
        cluster.add_node()
    back(run, "island-0", 1)
    concluded(run, folder)
