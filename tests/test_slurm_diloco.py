"""Islands on a real Slurm of four nodes: groups of nodes of one job, and jobs of their own (all but the first with -m long)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import command
import pytest
import slurm_cluster
from island_runs import check_agreement, check_same, is_given_up, is_member, num_attempts, step_of, told_by_all
from slurm_cluster import text_file, until, workers

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.gangs import island_run
from factory_train.run_dir import RunDir

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

ISLANDS = ("island-0", "island-1")
STEPS = 64
# Two islands of two ranks each.
WORDS = (
    *("recipe=llama_diloco", "diloco.fragments=2", "diloco.sync_every=8", "diloco.silence_s=3", "diloco.grace_s=60"),
    *(*slurm_cluster.QUICK, "tracking=none", f"train.steps={STEPS}"),
)
# Two small jobs would share nodes.
ON_SLURM = ("launcher=slurm", "launcher.fabric=loopback", "launcher.exclusive=true")
ONE = (*ON_SLURM, "launcher.nodes=2", "launcher.tasks_per_node=1", "launcher.island_jobs=one")
SEPARATE = (*ON_SLURM, "launcher.nodes=2", "launcher.tasks_per_node=1", "launcher.island_jobs=separate")
ENDLESS = ("train.steps=100000", "train.log_every=100")
# An island on one node: two nodes are left for what returns.
ON_ONE_NODE = ("launcher.nodes=1", "launcher.tasks_per_node=2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm_islands")


@pytest.fixture(scope="module")
def local(folder: Path) -> RunDir:
    """The same islands on one machine, without a scheduler."""
    done = command.run(
        *WORDS, "launcher=local", "launcher.tasks_per_node=2", "run=local", f"data.path={text_file(folder)}", cwd=folder, timeout_s=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs" / "llama_diloco-local")


def submit(folder: Path, name: str, *words: str) -> RunDir:
    done = command.run(*WORDS, f"run={name}", f"data.path={text_file(folder)}", *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs" / f"llama_diloco-{name}")


def done(run: RunDir, timeout_s: float = 300.0) -> None:
    until(lambda: (verdict := run.attempts()[-1].verdict()) and verdict.outcome == "done", timeout_s, lambda: told_by_all(run))


def nodes(run: RunDir, island: str, attempt: int = -1) -> list[str]:
    events = island_run(run, island).attempts()[attempt].events()
    return next(event["nodes"] for event in events if event["event"] == "start")


def stop(run: RunDir, folder: Path) -> int:
    """Stops a run, checks that all islands saved the same step of the same outer state, and returns that step."""
    stopped = command.run("stop", run.name, cwd=folder)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    verdict = run.attempts()[-1].verdict()
    assert verdict is not None, told_by_all(run)
    assert verdict.outcome == "interrupted", told_by_all(run)
    last = list_checkpoints(run)[0].step
    check_agreement(run, last)
    return last


def training(run: RunDir, above: int = 8) -> None:
    """Waits until all islands are members and train."""
    until(lambda: all(step_of(run, island) > above and is_member(run, island) for island in ISLANDS), 240, lambda: told_by_all(run))


def test_two_islands_of_two_ranks_on_four_nodes_compute_what_one_machine_does(cluster: Cluster, local: RunDir, folder: Path) -> None:
    run = submit(folder, "one", *ONE)
    done(run)
    check_same(run, local)
    assert len({node for island in ISLANDS for node in nodes(run, island)}) == 4
    assert list(run.evaluation.glob(f"step-{STEPS:08d}.json"))
    assert (run.export / "config.json").is_file()
    shown = command.run("status", run.name, cwd=folder).stdout
    assert f"island-1 left at step {STEPS}" in shown
    assert command.run("logs", run.name, "--island", "1", "--rank", "1", cwd=folder).returncode == 0


@pytest.mark.long
def test_islands_that_are_jobs_of_their_own_compute_the_same_and_one_of_them_ends_the_run(
    cluster: Cluster, local: RunDir, folder: Path
) -> None:
    run = submit(folder, "two", *SEPARATE)
    jobs = json.loads(run.attempts()[-1].job_path.read_text())
    assert len(set(jobs["job_ids"])) == 2
    done(run)
    check_same(run, local)
    assert len({node for island in ISLANDS for node in nodes(run, island)}) == 4
    assert len(list(run.evaluation.glob("*.json"))) == 1
    assert (run.export / "config.json").is_file()
    events = [event["event"] for event in run.attempts()[-1].events()]
    assert events.count("diloco-epoch") == 1
    until(lambda: not cluster.slurm("squeue", "--noheader", "--states=running,pending", f"--job={','.join(jobs['job_ids'])}"))


@pytest.mark.long
@pytest.mark.parametrize("words", [ONE, SEPARATE], ids=["one", "separate"])
def test_a_killed_island_returns_while_the_other_goes_on(cluster: Cluster, folder: Path, words: tuple[str, ...]) -> None:
    name = f"killed-{words[-1].rpartition('=')[2]}"
    run = submit(folder, name, *words, *ENDLESS)
    training(run)
    for pid in workers(island_run(run, "island-1")).values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: num_attempts(run, "island-1") == 2 and is_member(run, "island-1"), 240, lambda: told_by_all(run))
    stop(run, folder)
    assert num_attempts(run, "island-0") == 1
    assert len(run.attempts()) == 1


def begun_from(run: RunDir, island: str, attempt: int) -> int | None:
    """Returns the step that an attempt of an island took from checkpoints; None while it has not."""
    events = island_run(run, island).attempts()[attempt - 1].events()
    return next((event["step"] for event in events if event["event"] == "island-loaded"), None)


@pytest.mark.long
@pytest.mark.parametrize("words", [ONE, SEPARATE], ids=["one", "separate"])
def test_preempted_islands_save_and_go_on_together(cluster: Cluster, folder: Path, words: tuple[str, ...]) -> None:
    name = f"preempted-{words[-1].rpartition('=')[2]}"
    run = submit(folder, name, *words, "launcher.partition=preempt", *ENDLESS)
    training(run, above=40)
    cluster.slurm("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    until(lambda: [num_attempts(run, island) for island in ISLANDS] == [2, 2], 240, lambda: told_by_all(run))
    training(run)
    stop(run, folder)
    first = [island_run(run, island).attempts()[0].verdict() for island in ISLANDS]
    assert [verdict.outcome for verdict in first if verdict] == ["preempted", "preempted"]
    # All stopped at one step, and no step is repeated.
    assert [begun_from(run, island, 2) for island in ISLANDS] == [verdict.step for verdict in first if verdict]
    assert len({verdict.step for verdict in first if verdict}) == 1
    if words is ONE:
        verdict = run.attempts()[0].verdict()
        assert verdict is not None
        assert (verdict.outcome, len(run.attempts())) == ("preempted", 2)
    else:
        assert len(run.attempts()) == 1, "there is no job above those of the islands"


@pytest.mark.long
@pytest.mark.parametrize("words", [ONE, SEPARATE], ids=["one", "separate"])
def test_a_person_stops_all_islands_and_resumes_them(cluster: Cluster, folder: Path, words: tuple[str, ...]) -> None:
    name = f"stopped-{words[-1].rpartition('=')[2]}"
    run = submit(folder, name, *words, *ENDLESS)
    training(run)
    shown = command.run("status", run.name, cwd=folder).stdout
    assert shown.count("RUNNING on node") == (1 if words is ONE else 2), shown
    last = stop(run, folder)
    resumed = command.run("resume", run.name, f"train.steps={last + 40}", cwd=folder)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    done(run)
    check_agreement(run, last + 40)
    assert begun_from(run, "island-0", 2) == begun_from(run, "island-1", 2) == last


@pytest.mark.long
@pytest.mark.parametrize("how", ["one", "separate"])
def test_an_island_whose_node_is_lost_takes_no_other_with_it(cluster: Cluster, folder: Path, how: str) -> None:
    run = submit(folder, f"lost-{how}", *ON_SLURM, *ON_ONE_NODE, f"launcher.island_jobs={how}", *ENDLESS)
    training(run)
    (lost,) = nodes(run, "island-1")
    cluster.script("kill-node", lost, "now")
    try:
        if how == "separate":
            until(lambda: num_attempts(run, "island-1") == 2 and is_member(run, "island-1"), 240, lambda: told_by_all(run))
            assert nodes(run, "island-1") != [lost]
            stop(run, folder)
        else:
            # It cannot return: its node has left the job.
            given_up = step_of(run, "island-0")
            until(lambda: is_given_up(run, "island-1") and step_of(run, "island-0") > given_up + 50, 240, lambda: told_by_all(run))
            assert command.run("stop", run.name, cwd=folder).returncode == 0
    finally:
        cluster.script("start-node", lost)
    assert (num_attempts(run, "island-0"), len(run.attempts())) == (1, 1)
    verdict = run.attempts()[-1].verdict()
    assert verdict is not None
    assert verdict.outcome == "interrupted"


@pytest.mark.long
@pytest.mark.parametrize("how", ["requeue", "never"])
def test_a_job_of_islands_whose_first_node_is_lost_begins_again_or_ends(cluster: Cluster, folder: Path, how: str) -> None:
    """Their launcher was there; Slurm itself lets what is left go on."""
    run = submit(folder, f"lost-first-{how}", *ON_SLURM, *ON_ONE_NODE, "launcher.island_jobs=one", f"launcher.requeue={how}", *ENDLESS)
    training(run, above=40)
    (first,) = nodes(run, "island-0")
    cluster.script("kill-node", first, "now")
    try:
        if how == "requeue":
            until(lambda: all(num_attempts(run, island) >= 2 for island in ISLANDS), 300, lambda: told_by_all(run))
            training(run)
            assert first not in nodes(run, "island-0") + nodes(run, "island-1")
            stop(run, folder)
            assert begun_from(run, "island-0", 2) == begun_from(run, "island-1", 2) is not None
        else:
            until(lambda: not cluster.slurm("squeue", "--noheader", f"--name={run.name}").strip(), 300, lambda: told_by_all(run))
    finally:
        cluster.script("start-node", first)
    assert len(run.attempts()) == (2 if how == "requeue" else 1)
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert verdict.outcome == "failed-transient"
    assert verdict.reason == f"{first}, the first node of the job, was lost, and the launcher with it"


@pytest.mark.long
def test_islands_on_one_node_have_cards_of_their_own(cluster: Cluster, folder: Path) -> None:
    shared = ("launcher.islands_per_node=2", "launcher.gpus_per_node=4", "hardware.device=cpu")
    run = submit(folder, "shared", *ON_SLURM, *ON_ONE_NODE, *shared, "train.steps=400")
    training(run, above=0)
    shown = [
        dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)["CUDA_VISIBLE_DEVICES"]
        for island in ISLANDS
        for pid in workers(island_run(run, island)).values()
    ]
    assert shown == ["0,1", "0,1", "2,3", "2,3"]
    done(run)
    check_agreement(run, 400)
    assert nodes(run, "island-0") == nodes(run, "island-1")


@pytest.mark.long
def test_the_time_limit_of_the_job_is_that_of_all_islands(cluster: Cluster, folder: Path) -> None:
    run = submit(folder, "limit", *ONE, "launcher.time=1", *ENDLESS)
    until(lambda: all(num_attempts(run, island) >= 2 for island in ISLANDS), 400, lambda: told_by_all(run))
    verdict = run.attempts()[0].verdict()
    assert verdict is not None
    assert verdict.outcome == "preempted"
    until(lambda: all(begun_from(run, island, 2) is not None for island in ISLANDS), 240, lambda: told_by_all(run))
    assert begun_from(run, "island-0", 2) == begun_from(run, "island-1", 2) == verdict.step
    # The limit would come before all that a person's stop does.
    assert command.run("stop", run.name, "--now", cwd=folder).returncode == 0


@pytest.mark.long
def test_islands_share_the_nodes_of_an_allocation(cluster: Cluster, local: RunDir, folder: Path) -> None:
    enter = ("salloc", "--quiet", "--nodes=4", "--ntasks-per-node=1", "--time=10")
    train = (sys.executable, "-m", "factory_train", *WORDS, "launcher.fabric=loopback", "run=inside", f"data.path={text_file(folder)}")
    found = subprocess.run([*enter, *train], cwd=folder, env=command.environment(), capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "allocation (inside allocation" in found.stdout
    run = RunDir.open(folder / "runs" / "llama_diloco-inside")
    check_same(run, local)
    assert len({node for island in ISLANDS for node in nodes(run, island)}) == 4
