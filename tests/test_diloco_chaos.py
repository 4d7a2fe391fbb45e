"""Islands as the launcher runs them, killed, stopped, cut off, damaged: the run ends, and all islands agree."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import command
import psutil
import pytest
from faulty_links import Links

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


@pytest.fixture
def links(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Links:
    """What is wrong with the links of runs that have `FAULTY` among their words."""
    shutil.copy(Path(__file__).with_name("faulty_links.py"), folder)
    monkeypatch.setenv("LINKS", str(folder / "links.json"))
    return Links(folder / "links.json")


FAULTY = "plugins=[faulty_links]"
# From here on the run goes slowly until all faults are over.
CRAWL_AT = 400


@pytest.fixture
def begin(folder: Path) -> Iterator[Callable[..., Chaos]]:
    """Starts runs; what a failed test leaves of them is ended."""
    begun = []

    def start(*words: Any) -> Chaos:
        begun.append(Chaos(folder, *words))
        return begun[-1]

    yield start
    for chaos in begun:
        if chaos.process.poll() is None:
            main = psutil.Process(chaos.process.pid)
            for process in (*main.children(recursive=True), main):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            chaos.process.communicate()


def words(run: str, steps: int, islands: int, *more: str) -> tuple[str, ...]:
    return (
        *("recipe=llama_diloco", f"run={run}", "data.path=text.txt", *command.SMALL, "tracking=none", f"diloco.islands={islands}"),
        *("diloco.fragments=2", "diloco.sync_every=8", "diloco.silence_s=3", "train.validate_every=0", f"train.steps={steps}"),
        *("train.global_batch_tokens=384", "train.num_threads=1", "checkpoint.every_steps=100", *more),
    )


class Chaos:
    """A run under way, and what is done to it."""

    def __init__(self, folder: Path, name: str, steps: int, islands: int, *more: str) -> None:
        self.steps, self.islands = steps, [f"island-{index}" for index in range(islands)]
        # When which island was stopped by a test, from and to, by the clock of the rows.
        self.stops: list[tuple[str, float, float]] = []
        self.process = command.start(*words(name, steps, islands, *more), cwd=folder)
        self.run = RunDir(folder / "runs" / f"llama_diloco-{name}")
        self.board = FolderBoard(exchange_folder(self.run))

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 300.0) -> None:
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

    def ranks(self, island: str) -> list[psutil.Process]:
        """The processes of an island's ranks."""
        job = storage.read_json(island_run(self.run, island).last_attempt().job_path)
        found = []
        for child in psutil.Process(job["pid"]).children():
            with contextlib.suppress(psutil.Error):
                if "factory_train.worker" in " ".join(child.cmdline()):
                    found.append(child)
        assert found, f"{island} has no rank"
        return found

    def kill(self, island: str) -> None:
        self.ranks(island)[0].send_signal(signal.SIGKILL)

    @contextlib.contextmanager
    def stopped(self, island: str) -> Iterator[None]:
        """Stops an island and everything it has started."""
        family = [process for rank in self.ranks(island) for process in (rank, *rank.children(recursive=True))]
        for process in family:
            process.send_signal(signal.SIGSTOP)
        began = time.time()
        try:
            yield
        finally:
            for process in family:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
            self.stops.append((island, began, time.time()))

    def coordinator(self) -> str:
        lease = self.board.lease()
        assert lease is not None
        return lease.island

    def all_back(self) -> bool:
        return all(map(self.is_member, self.islands))

    def kill_and_await(self, island: str) -> None:
        before = self.incarnation(island)
        self.kill(island)
        self.until(lambda: self.incarnation(island) > before and self.all_back(), f"{island} returns")

    def cut_and_mend(self, links: Links, a: str, b: str, *, silent: bool = False) -> None:
        """Cuts a link until the islands have parted."""
        links.set(cut=[[a, b]], silent=silent)
        self.until(lambda: not {a, b} <= {*self.board.epoch().members}, f"{a} and {b} part")
        links.set(cut=[])
        self.until(self.all_back, f"{a} and {b} are together again")

    def rows(self, island: str, kind: str) -> list[list[dict]]:
        """The rows of each attempt, whatever later ones say of the same steps."""
        texts = [attempt.metrics_path.read_text() for attempt in island_run(self.run, island).attempts() if attempt.metrics_path.exists()]
        found = [[json.loads(line) for line in text.splitlines() if line.endswith("}")] for text in texts]
        return [[row for row in rows if row["kind"] == kind] for rows in found]

    def longest_wait(self) -> float:
        """The longest time between two steps of an island, in seconds, where it was neither outside nor stopped itself."""
        outside = [(event["time"], island) for island in self.islands for event in self._events_of(island, "diloco-left-behind")]
        longest = 0.0
        for island in self.islands:
            for rows in self.rows(island, "train"):
                times = sorted(row["time"] for row in rows)
                for start, end in itertools.pairwise(times):
                    left = any(who == island and start <= when <= end for when, who in outside)
                    stopped = any(who == island and since <= end and until >= start for who, since, until in self.stops)
                    longest = max(longest, 0.0 if left or stopped else end - start)
        return longest

    def usual_step(self) -> float:
        """The median time between two steps before the crawl began, in seconds."""
        times = [[row["time"] for row in rows if row["step"] < CRAWL_AT] for island in self.islands for rows in self.rows(island, "train")]
        return statistics.median(end - start for rows in times for start, end in itertools.pairwise(rows))

    def loss(self) -> float:
        return json.loads(next(iter(self.run.evaluation.glob("*.json"))).read_text())["loss"]

    def _events_of(self, island: str, kind: str) -> list[dict]:
        return [event for attempt in island_run(self.run, island).attempts() for event in attempt.events() if event["event"] == kind]

    def wait(self, timeout_s: float = 280.0) -> None:
        out, err = self.process.communicate(timeout=timeout_s)
        assert self.process.returncode == 0, out + err

    def events(self, kind: str) -> list[dict]:
        found = [event for island in self.islands for event in self._events_of(island, kind)]
        return sorted(found, key=lambda event: event["time"])

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
        print(f"{len(self.events('diloco-epoch'))} epochs; longest wait between two steps {self.longest_wait():.1f} s")


@pytest.mark.cluster
def test_killed_islands_return_and_the_coordinators_too(begin: Callable[..., Chaos]) -> None:
    chaos = begin("killed", 1500, 2, "diloco.grace_s=20")
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
def test_killed_and_cut_off_islands_return_and_the_coordinators_too(begin: Callable[..., Chaos], links: Links) -> None:
    links.set(pace_s=0.05, crawl=[200, 1.0])
    chaos = begin("chaos", 300, 3, "diloco.grace_s=5", FAULTY)
    chaos.until(lambda: chaos.all_back() and min(map(chaos.step, chaos.islands)) > 20, "training begins")
    chaos.kill_and_await(chaos.coordinator())
    chaos.cut_and_mend(links, "island-0", "island-2")
    links.set(damaged={"island-1": 3})
    chaos.until(lambda: any(not row["counted"] for rows in chaos.rows("island-1", "sync")[-1:] for row in rows), "damage is noticed")
    links.set(pace_s=0.0, crawl=None)
    chaos.wait()
    chaos.check_end()
    assert len(chaos.events("diloco-joined")) >= 2
    assert len(chaos.events("diloco-coordinator")) >= 2
    assert any("cannot reach all others" in event["message"] for event in chaos.events("diloco-epoch"))


@pytest.mark.cluster
@pytest.mark.long
def test_no_rank_waits_for_a_stopped_island_as_long_as_for_one_that_lives(begin: Callable[..., Chaos], links: Links) -> None:
    """The grace time is longer than the test: what ends the waiting is that the island gives no sign, which every rank has to learn."""
    links.set(pace_s=0.05)
    chaos = begin("silent", 600, 2, "launcher.tasks_per_node=2", "diloco.grace_s=1000", "diloco.silence_s=6", FAULTY)
    chaos.until(lambda: chaos.all_back() and min(map(chaos.step, chaos.islands)) > 20, "training begins")
    with chaos.stopped("island-1"):
        stopped_at = chaos.step("island-1")
        chaos.until(lambda: chaos.step("island-0") > stopped_at + 60, "the other goes on alone")
    chaos.until(chaos.all_back, "it returns")
    links.set(pace_s=0.0)
    chaos.wait()
    chaos.check_end()
    assert any("island-1 silent for 6 s" in event["message"] for event in chaos.events("diloco-epoch"))
    assert len(chaos.events("diloco-joined")) == 1


@pytest.mark.cluster
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_random_faults(begin: Callable[..., Chaos], links: Links) -> None:
    """Everything that can happen to islands, at random times; the loss ends where those of undisturbed runs do.

    CHAOS_SEED fixes what happens when; a busy machine shifts it.
    """
    seed = int(os.environ.get("CHAOS_SEED", random.randrange(10**6)))
    rng = random.Random(seed)
    print(f"CHAOS_SEED={seed}")
    steps, grace_s = 500, 8.0
    links.set(pace_s=0.2, crawl=[CRAWL_AT, 3.0], absent=["island-2"])
    chaos = begin("chaos", steps, 3, f"diloco.grace_s={grace_s}", "checkpoint.every_steps=20", FAULTY)
    joins_at = rng.randrange(10, 40)
    chaos.until(lambda: chaos.step("island-0") > joins_at, "two islands begin")
    links.set(absent=[])
    chaos.until(chaos.all_back, "the third joins")
    faults = [*("kill", "kill the coordinator", "stop", "cut", "silent cut", "damage"), *rng.choices(("kill", "stop", "cut"), k=2)]
    rng.shuffle(faults)
    done = []
    for fault in faults:
        time.sleep(rng.expovariate(1 / 3.0))
        chaos.until(chaos.all_back, "all are there")
        island, other = rng.sample(chaos.islands, 2)
        done.append(f"{fault} at step {max(map(chaos.step, chaos.islands))}")
        match fault:
            case "kill" | "kill the coordinator":
                chaos.kill_and_await(island if fault == "kill" else chaos.coordinator())
            case "stop":
                epoch = chaos.board.epoch().number
                with chaos.stopped(island):
                    time.sleep(grace_s + rng.uniform(3, 8))
                chaos.until(lambda epoch=epoch: chaos.board.epoch().number > epoch and chaos.all_back(), f"{island} returns")
            case "cut" | "silent cut":
                chaos.cut_and_mend(links, island, other, silent=fault == "silent cut")
            case "damage":
                links.set(damaged={island: rng.choice((1, 3))})
    print(f"faults: {done}")
    assert max(map(chaos.step, chaos.islands)) < steps, "the run was over before the faults were"
    links.set(pace_s=0.0, crawl=None)
    chaos.wait(1500)
    chaos.check_end()
    print(f"grace time {grace_s:g} s; a step while there were faults: {chaos.usual_step():.2f} s")
    # The rest is for a machine that others keep busy.
    assert chaos.longest_wait() <= grace_s + 5.0
    losses = []
    for other in range(8):
        clean = begin(f"clean{other}", steps, 3, f"train.seed={1234 + other}")
        clean.wait(1500)
        losses.append(clean.loss())
    print(f"loss with faults {chaos.loss():.4f}, without, by seed {', '.join(f'{loss:.4f}' for loss in losses)}")
    assert abs(chaos.loss() - statistics.fmean(losses)) <= 3 * statistics.stdev(losses)


@pytest.mark.cluster
@pytest.mark.long
def test_ctrl_c_saves_all_islands_and_the_same_command_goes_on(begin: Callable[..., Chaos], folder: Path) -> None:
    first = begin("signal", 100000, 2)
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
    assert "of the time not waiting for each other" in done.stdout
    assert list_checkpoints(first.run)[0].step == last
    loaded = first.events("island-loaded")
    assert len(loaded) == 2
    assert len({event["step"] for event in loaded}) == 1, "all islands begin from the same step"
    # A table and one run: what status says of islands.
    shown = command.run("status", "llama_diloco-signal", cwd=folder).stdout
    assert f"island-0 left at step {last}" in shown
    logs = command.run("logs", "llama_diloco-signal", "--island", "1", cwd=folder)
    assert logs.returncode == 0, logs.stderr
