"""Islands as the launcher runs them, with some of their processes killed or stopped: the run ends, and all islands agree."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import command
import psutil
import pytest

from factory_train import storage
from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.distributed.board import FolderBoard
from factory_train.gangs import exchange_folder, island_run
from factory_train.run_dir import RunDir


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    return tmp_path


def words(run: str, steps: int, islands: int, *more: str) -> tuple[str, ...]:
    return (
        *("recipe=llama_diloco", f"run={run}", "data.path=text.txt", *command.SMALL, "tracking=none", f"diloco.islands={islands}"),
        *("diloco.fragments=2", "diloco.sync_every=8", "diloco.silence_s=3", "train.validate_every=0", f"train.steps={steps}"),
        *("train.global_batch_tokens=384", "train.num_threads=1", "checkpoint.every_steps=100", "train.log_every=500", *more),
    )


class Chaos:
    """A run under way, and what is done to it."""

    def __init__(self, folder: Path, name: str, steps: int, islands: int, *more: str) -> None:
        self.steps, self.islands = steps, [f"island-{index}" for index in range(islands)]
        self.process = command.start(*words(name, steps, islands, *more), cwd=folder)
        self.run = RunDir(folder / "runs" / f"llama_diloco-{name}")
        self.board = FolderBoard.reading(exchange_folder(self.run))

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 120.0) -> None:
        limit = time.monotonic() + timeout_s
        while not holds():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < limit, what
            time.sleep(0.05)

    def step(self, island: str) -> int:
        beat = self.board.beats().get(island)
        return beat.step if beat else 0

    def incarnation(self, island: str) -> int:
        return island_run(self.run, island).last_attempt().number

    def is_member(self, island: str) -> bool:
        epoch, beat = self.board.epoch(), self.board.beats().get(island)
        return epoch is not None and beat is not None and epoch.has(island, self.incarnation(island)) and beat.epoch == epoch.number

    def rank(self, island: str) -> psutil.Process:
        """The process of an island's only rank."""
        job = storage.read_json(island_run(self.run, island).last_attempt().job_path)
        for child in psutil.Process(job["pid"]).children():
            with contextlib.suppress(psutil.Error):
                if "factory_train.worker" in " ".join(child.cmdline()):
                    return child
        raise AssertionError(f"{island} has no rank")

    def kill(self, island: str) -> None:
        self.rank(island).send_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def stopped(self, island: str) -> Iterator[None]:
        """Stops an island and everything it has started."""
        rank = self.rank(island)
        family = [rank, *rank.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)

    def wait(self, timeout_s: float = 280.0) -> None:
        out, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, out + err

    def events(self, kind: str) -> list[dict]:
        found = [
            event for island in self.islands for attempt in island_run(self.run, island).attempts() for event in attempt.events()
        ]  # fmt: skip
        return sorted((event for event in found if event["event"] == kind), key=lambda event: event["time"])

    def check_end(self) -> None:
        """All islands did the last step with the same outer state, and no step of those that stayed is missing."""
        prints = {}
        for island in self.islands:
            (newest, *_) = list_checkpoints(island_run(self.run, island))
            assert newest.step == self.steps
            with CheckpointReader(newest.path) as reader:
                prints[island] = reader.state["diloco"]["fingerprint"]
        assert len(set(prints.values())) == 1, prints
        assert list_checkpoints(self.run)[0].step == self.steps
        waits = [row["waited_s"] for island in self.islands for row in island_run(self.run, island).metrics() if row["kind"] == "sync"]
        print(f"{len(self.events('diloco-epoch'))} epochs; longest wait {max(waits):.1f} s")


@pytest.mark.cluster
def test_killed_islands_return_and_the_coordinators_too(folder: Path) -> None:
    chaos = Chaos(folder, "killed", 1500, 2, "diloco.grace_s=20")
    chaos.until(lambda: min(map(chaos.step, chaos.islands)) > 100, "training begins")
    for island in reversed(chaos.islands):
        before = chaos.incarnation(island)
        chaos.kill(island)
        chaos.until(
            lambda island=island, before=before: chaos.incarnation(island) > before and chaos.is_member(island), f"{island} returns"
        )
    assert max(map(chaos.step, chaos.islands)) < 1500, "the run was over before its islands were back"
    chaos.wait()
    chaos.check_end()
    # One island was always there: it made every step once.
    joined = chaos.events("diloco-joined")
    assert len(joined) == 2
    assert len(chaos.events("diloco-coordinator")) >= 2


@pytest.mark.cluster
@pytest.mark.long
def test_random_faults(folder: Path) -> None:
    """SIGKILL and SIGSTOP beyond the grace time, at random times; the loss ends where an undisturbed run's does."""
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    rng = random.Random(seed)
    print(f"CHAOS_SEED={seed}")
    steps, grace_s = 4000, 4.0
    chaos = Chaos(folder, "chaos", steps, 3, f"diloco.grace_s={grace_s}")
    chaos.until(lambda: min(map(chaos.step, chaos.islands)) > 100, "training begins")
    done = []
    while max(map(chaos.step, chaos.islands)) < steps * 0.7 and len(done) < 6:
        time.sleep(rng.expovariate(1 / 3.0))
        island, fault = rng.choice(chaos.islands), rng.choice(["kill", "stop"])
        if not chaos.is_member(island):
            continue
        before = chaos.incarnation(island)
        if fault == "kill":
            chaos.kill(island)
            chaos.until(lambda island=island, before=before: chaos.incarnation(island) > before and chaos.is_member(island), "returns")
        else:
            epoch = chaos.board.epoch().number
            with chaos.stopped(island):
                time.sleep(grace_s + 4.0)
            chaos.until(lambda island=island, epoch=epoch: chaos.board.epoch().number > epoch and chaos.is_member(island), "returns")
        done.append((fault, island))
    print(f"faults: {done}")
    chaos.wait()
    chaos.check_end()
    assert len(done) >= 3
    clean = Chaos(folder, "clean", steps, 3)
    clean.wait()
    losses = [json.loads(next(iter(run.evaluation.glob("*.json"))).read_text())["loss"] for run in (chaos.run, clean.run)]
    print(f"loss with faults {losses[0]:.4f}, without {losses[1]:.4f}")
    assert losses[0] < losses[1] + 0.1


@pytest.mark.cluster
def test_ctrl_c_saves_all_islands_and_the_same_command_goes_on(folder: Path) -> None:
    first = Chaos(folder, "signal", 100000, 2)
    first.until(lambda: min(map(first.step, first.islands)) > 120, "training begins")
    first.process.send_signal(signal.SIGINT)
    out, err = first.process.communicate(timeout=100)
    assert first.process.returncode == 130, out + err
    verdict = first.run.last_attempt().verdict()
    assert verdict.outcome == "interrupted"
    saved = [list_checkpoints(island_run(first.run, island))[0].step for island in first.islands]
    assert min(saved) > 120
    last = max(saved) + 40
    done = command.run(*words("signal", 100000, 2, f"train.steps={last}"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert list_checkpoints(first.run)[0].step == last
    loaded = first.events("island-loaded")
    assert len(loaded) == 2
    assert len({event["step"] for event in loaded}) == 1, "all islands begin from the same step"
    # A table and one run: what status says of islands.
    shown = command.run("status", "llama_diloco-signal", cwd=folder).stdout
    assert f"island-0 left at step {last}" in shown
    logs = command.run("logs", "llama_diloco-signal", "--island", "1", cwd=folder)
    assert logs.returncode == 0, logs.stderr
