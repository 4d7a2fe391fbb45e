"""Islands that meet over TCP: the same training as through a folder, also while the server is away."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import command
import pytest
import torch
import torch.distributed as dist
from island_threads import join
from served_board import free_port, served
from test_diloco_chaos import words
from test_diloco_elastic import LeavesError, check_same, finish, leave_at, start, unhurried
from test_diloco_runs import STEPS, curve, island_settings
from toy_islands import Toy, config, equal, train

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.compare import compare
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.commands.status import run_status
from factory_train.config import Config
from factory_train.data.catalog import cache_root, find_prepared
from factory_train.data.loader import TokenLoader
from factory_train.data.manifest import DataManifest
from factory_train.errors import FactoryTrainError
from factory_train.gangs import exchange_folder, island_run, new_island_attempt
from factory_train.hardware import detect
from factory_train.island_checkpoint import newest_of_all
from factory_train.island_trainer import IslandTrainer
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.rendezvous import serving
from factory_train.plan import make_plan
from factory_train.preemption import StopSignal
from factory_train.recipes.pretrain import prepare
from factory_train.rendezvous.address import TOKEN_VARIABLE, keep_token
from factory_train.run_dir import Attempt, RunDir
from factory_train.trainer import Outcome

STREAMING = {"sync_every": 6, "fragments": 3, "delay": 2, "payload": "int8"}


def test_over_tcp_training_is_that_through_a_folder(tmp_path: Path) -> None:
    through_folder = train(tmp_path / "folder", cfg=config(**STREAMING))
    with served(tmp_path / "tcp", free_port()) as rendezvous:
        over_tcp = train(tmp_path / "tcp", cfg=config(**STREAMING, rendezvous=rendezvous))
    check_same(*through_folder, *over_tcp)
    assert all(equal(a.values, b.values) for a, b in zip(through_folder, over_tcp, strict=True))


def test_the_coordinator_leaves_and_comes_back(tmp_path: Path) -> None:
    """Whoever was there first coordinates, and is the one that leaves."""
    left: list[Toy] = []
    returned: list[Toy] = []
    slowly = unhurried(lambda: returned and returned[0].rows("diloco-joined"))

    def before_step(toy: Toy, step: int) -> None:
        if step == 9 and not left and toy.rows("diloco-coordinator"):
            left.append(toy)
            raise LeavesError
        slowly(toy, step)

    with served(tmp_path, free_port()) as rendezvous:
        cfg = config(islands=3, **STREAMING, rendezvous=rendezvous)
        toys = [Toy(tmp_path, f"island-{index}", cfg, 120, before_step=before_step) for index in range(3)]
        threads = {toy.name: start(toy, LeavesError) for toy in toys}
        while not left and any(thread.is_alive() for thread in threads.values()):
            time.sleep(0.05)
        finish(threads.pop(left[0].name), timeout_s=60)
        returned.append(Toy(tmp_path, left[0].name, cfg, 120, incarnation=2))
        finish(*threads.values(), start(returned[0]))
    others = [toy for toy in toys if toy is not left[0]]
    check_same(*others, *returned)
    assert [len(toy.samples) for toy in others] == [120, 120]
    assert returned[0].rows("diloco-joined")
    assert [row["lease"] for row in left[0].rows("diloco-coordinator")] == [1]
    assert [row["lease"] for toy in others for row in toy.rows("diloco-coordinator")] == [2]
    seen = Counter(sample for toy in (*others, *returned) for sample in toy.samples)
    assert max(seen.values()) == 1


def test_an_island_that_was_started_otherwise_is_not_let_in(tmp_path: Path) -> None:
    cfg = config(islands=3, **STREAMING)
    failures = []
    toys = [Toy(tmp_path, f"island-{index}", cfg, 120, before_step=unhurried(lambda: failures)) for index in range(3)]
    toys[2].before_step = leave_at(9)
    threads = [start(toy, LeavesError if index == 2 else None) for index, toy in enumerate(toys)]
    threads[2].join(60)
    with pytest.raises(FactoryTrainError, match="were not started with the same configuration"):
        Toy(tmp_path, "island-2", cfg, 120, incarnation=2, layout="another").run()
    failures.append("it has")
    finish(*threads[:2])
    check_same(*toys[:2])
    assert {row["members"] for row in toys[0].rows("sync")} == {3, 2}
    assert toys[0].outer.epoch.members == {"island-0": 1, "island-1": 1}


def test_while_the_server_is_away_rounds_go_on_and_a_change_waits_for_it(tmp_path: Path) -> None:
    """One island of three leaves while nobody serves: the others go on when the server is back, and have lost no step."""
    port = free_port()
    reached = threading.Event()
    with served(tmp_path, port) as rendezvous:
        cfg = config(islands=3, **STREAMING, silence_s=6.0, grace_s=30.0, rendezvous=rendezvous)
        toys = [Toy(tmp_path, f"island-{index}", cfg, 60) for index in range(3)]
        is_away = threading.Event()

        def before_step(toy: Toy, step: int) -> None:
            time.sleep(0.01)
            if step == 8:
                reached.set()
                assert is_away.wait(60)
            if step == 30 and toy is toys[2]:
                raise LeavesError

        for toy in toys:
            toy.before_step = before_step
        threads = [start(toy, LeavesError if index == 2 else None) for index, toy in enumerate(toys)]
        assert reached.wait(60)
    is_away.set()
    threads[2].join(60)
    # It came so far with rounds alone, and no island can go much further.
    assert len(toys[2].samples) == 30
    assert toys[2].rows("sync")
    assert all(thread.is_alive() for thread in threads[:2])
    assert max(len(toy.samples) for toy in toys[:2]) < 40
    with served(tmp_path, port):
        finish(*threads[:2])
    check_same(*toys[:2])
    assert [len(toy.samples) for toy in toys[:2]] == [60, 60]
    assert toys[0].rows("sync")[-1]["members"] == 2


def test_a_server_that_stays_away_ends_the_wait_of_those_that_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory_train.distributed.membership.AWAY_GRACES", 0.5)
    (tmp_path / "exchange").mkdir()
    port = free_port()
    with served(tmp_path / "exchange", port):
        pass
    cfg = config(islands=2, grace_s=1.0, rendezvous=f"tcp://127.0.0.1:{port}")
    with pytest.raises(FactoryTrainError) as caught:
        Toy(tmp_path / "exchange", "island-0", cfg, 9).run()
    assert f"nothing listens at tcp://127.0.0.1:{port}" in str(caught.value)
    assert "diloco.grace_s" in str(caught.value)


# Runs on two sides: each has its own folder, with its own run directory in it


def test_islands_begin_from_the_newest_step_that_any_side_has() -> None:
    deal = {"steps": 4}
    assert newest_of_all({"a": {"8": deal, "4": deal}, "b": {"8": deal}}) == (8, deal, ("a", "b"))
    assert newest_of_all({"a": {"8": deal}, "b": {"12": deal, "8": deal}}) == (12, deal, ("b",))
    assert newest_of_all({"a": {}, "b": {"12": None}}) == (12, None, ("b",))


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, os.urandom(16).hex())
    # Set, so that what islands choose for their process does not stay in this one.
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


class Sides:
    """Two folders as on two clusters, one island in each."""

    def __init__(self, root: Path) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.folders = [root / f"cluster-{index}" for index in range(2)]
        for folder in self.folders:
            folder.mkdir(parents=True)
            (folder / "text.txt").write_text(Path(subprocess.__file__).read_text())

    def config(self, index: int, steps: int) -> Config:
        folder = self.folders[index]
        cfg = island_settings(folder / "text.txt", folder, rendezvous=self.address, local_islands=[index])
        cfg.train.steps = steps
        return cfg

    def train(self, steps: int) -> list[RunDir]:
        """Trains up to a step; each side with its launcher's part."""
        attempts = [begin_attempt(folder, self.config(index, steps)) for index, folder in enumerate(self.folders)]
        with contextlib.ExitStack() as stack:
            for attempt in attempts:
                stack.enter_context(serving(attempt, attempt.record_launch_event))
            train_islands([(attempt, f"island-{index}") for index, attempt in enumerate(attempts)])
        return [attempt.run for attempt in attempts]


def begin_attempt(folder: Path, cfg: Config) -> Attempt:
    """Makes the next attempt of the run in a folder, as the command that starts it does."""
    cfg.checkpoint.mode = "sync"
    path = folder / "islands-x"
    run = RunDir.open(path) if path.exists() else RunDir.create(folder, "islands", "x")
    if cfg.diloco.rendezvous is not None:
        keep_token(exchange_folder(run))
    attempt = run.new_attempt(cfg)
    prepare(cfg, attempt)
    return attempt


def train_islands(islands: list[tuple[Attempt, str]]) -> None:
    """Trains islands of one rank each as threads; each is the only rank of its world, and so is the process."""
    outcomes: dict[str, object] = {}

    def work(main: Attempt, name: str) -> None:
        try:
            cfg = main.config()
            attempt = new_island_attempt(main.run, name, cfg)
            plan = make_plan(cfg, DataManifest.load(attempt.run.data).vocab_size, detect(cfg.hardware), vocab_exact=True)
            dataset = find_prepared(cfg.data, cache_root(cfg, attempt.run.path.parent))
            env = WorkerEnv(str(attempt.run.path), attempt.number, name)
            outcomes[name] = IslandTrainer(cfg, plan, attempt, env, torch.device("cpu"), StopSignal(), dataset).train()
        except BaseException as error:
            outcomes[name] = error

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        join([threading.Thread(target=work, args=island, daemon=True) for island in islands], 200.0)
    finally:
        dist.destroy_process_group()
    assert outcomes == {name: Outcome.DONE for _, name in islands}


def newest_differences(a: RunDir, b: RunDir) -> list[str]:
    with CheckpointReader(list_checkpoints(a)[0].path) as first, CheckpointReader(list_checkpoints(b)[0].path) as second:
        assert first.state["step"] == second.state["step"]
        return [str(found) for found in compare(first, second) if not found.equal]


def of_island(run: RunDir, island: str, kind: str) -> list[dict]:
    return [event for event in island_run(run, island).last_attempt().events() if event["event"] == kind]


@pytest.mark.usefixtures("token")
def test_two_runs_that_share_nothing_but_an_address_train_as_one(tmp_path: Path) -> None:
    """Bit for bit as two islands of one run that meet in its directory; and each side has all of the result."""
    sides = Sides(tmp_path)
    both = sides.train(STEPS)
    (tmp_path / "one").mkdir()
    one = begin_attempt(tmp_path / "one", island_settings(sides.folders[0] / "text.txt", tmp_path / "one"))
    train_islands([(one, "island-0"), (one, "island-1")])
    for index, run in enumerate(both):
        assert not newest_differences(run, one.run)
        assert curve(run, f"island-{index}") == curve(one.run, f"island-{index}")
        assert [path.name for path in (run.path / "gangs").iterdir()] == [f"island-{index}"]
        assert [row["step"] for row in run.metrics()] == [row["step"] for row in one.run.metrics()]
        # The one that serves knows what the other says, too.
        assert f"island-{index} left at step {STEPS}" in run_status(run).islands
        assert "epoch 1: begins at step 0" in run_status(run).islands
    served = [event["message"].partition(":")[0] for run in both for event in run.last_attempt().events() if event["event"] == "rendezvous"]
    assert served == ["served here", "served elsewhere"]


@pytest.mark.usefixtures("token")
@pytest.mark.long
def test_a_side_that_lost_everything_takes_it_from_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that would coordinate, and has nothing to begin with; before, both go on from what each has."""
    sides = Sides(tmp_path)
    sides.train(STEPS)
    both = sides.train(20)
    assert [of_island(run, f"island-{index}", "island-loaded")[0]["step"] for index, run in enumerate(both)] == [STEPS, STEPS]
    for folder in (both[0].checkpoints, island_run(both[0], "island-0").checkpoints):
        shutil.rmtree(folder)
    step = IslandTrainer.train_step

    def unhurried_step(self: IslandTrainer, loader: TokenLoader) -> None:
        # However busy the machine is, the other joins before the end.
        time.sleep(0.0 if len(self.outer.epoch.members) == 2 else 0.02 if self.step < 60 else 1.0)
        step(self, loader)

    monkeypatch.setattr(IslandTrainer, "train_step", unhurried_step)
    both = sides.train(120)
    assert of_island(both[1], "island-1", "island-loaded")[0]["step"] == 20
    assert of_island(both[0], "island-0", "diloco-joined")[0]["step"] >= 20
    assert list_checkpoints(both[0])[0].step == 120
    assert not newest_differences(*both)


@pytest.mark.usefixtures("token")
def test_sides_with_other_keys_do_not_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = Sides(tmp_path)
    config = sides.config

    def other(index: int, steps: int) -> Config:
        cfg = config(index, steps)
        cfg.optim.lr *= 1 + index
        cfg.diloco.grace_s = 2.0
        return cfg

    monkeypatch.setattr(sides, "config", other)
    with pytest.raises(AssertionError, match="were not started with the same configuration, data and ranks"):
        sides.train(STEPS)


@pytest.mark.cluster
@pytest.mark.long
def test_the_recipe_meets_over_tcp_as_in_its_directory(tmp_path: Path) -> None:
    """The command, with its launcher and its processes: one run over TCP, one through files, the same bits."""
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    address = f"diloco.rendezvous=tcp://127.0.0.1:{free_port()}"
    for name, more in (("files", ()), ("tcp", (address,))):
        done = command.run(*words(name, 24, 2, "train.deterministic=true", *more), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    files, tcp = (RunDir(tmp_path / "runs" / f"llama_diloco-{name}") for name in ("files", "tcp"))
    assert not newest_differences(files, tcp)
    assert (tcp.path / "exchange" / "token").stat().st_mode & 0o777 == 0o600
    assert not (files.path / "exchange" / "token").exists()
