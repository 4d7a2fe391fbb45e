"""Islands as threads, with faults of all kinds at random times, seed after seed; `test_diloco_chaos` does so with processes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_links import Links, install
from test_diloco_elastic import LATE_S, LeavesError, check_same, finish, start
from toy_islands import Toy, config

from factory_train.distributed.board import FolderBoard

STEPS = 300
FAULTS = ("crash", "crash of the coordinator", "cut", "damage", "silent cut", "stall")
ISLANDS = ("island-0", "island-1", "island-2")


class Fleet:
    """Islands that are started again when they crash, and do what they are told before a step.

    Args:
        folder: where they meet.
    """

    def __init__(self, folder: Path) -> None:
        self.board, self._folder = FolderBoard(folder), folder
        self.cfg = config(islands=3, grace_s=LATE_S, sync_every=6, fragments=3, delay=2, payload="int8")
        self.toys: dict[str, Toy] = {}
        # Between two steps of an island that was a member all the time, in seconds.
        self.waits: list[float] = []
        self._left: dict[int, tuple[float, int]] = {}
        self.threads: list[threading.Thread] = []
        self.orders: dict[str, str] = {}
        # Whether all that was to happen has happened; until then they train on slowly.
        self.over = False

    def start(self, name: str) -> None:
        incarnation = self.toys[name].incarnation + 1 if name in self.toys else 1
        self.toys[name] = Toy(self._folder, name, self.cfg, STEPS, incarnation=incarnation, before_step=self._before_step)
        self.threads.append(start(self.toys[name], LeavesError))

    def _before_step(self, toy: Toy, step: int) -> None:
        since, outside = self._left.get(id(toy), (time.monotonic(), 0))
        if outside == len(toy.rows("diloco-left-behind")):
            self.waits.append(time.monotonic() - since)
        self._do(toy, step)
        self._left[id(toy)] = time.monotonic(), len(toy.rows("diloco-left-behind"))

    def _do(self, toy: Toy, step: int) -> None:
        order = self.orders.pop(toy.name, None)
        if order == "crash":
            toy.outer._exchange._membership._closed.set()
            toy.outer._exchange._wire.close()
            raise LeavesError
        while order == "stall" and self.board.epoch().has(toy.name, toy.incarnation):
            time.sleep(0.05)
        if not self.over:
            time.sleep(0.02 if step < STEPS * 0.7 else 1.0)

    def are_all_members(self) -> bool:
        epoch, beats = self.board.epoch(), self.board.beats()
        return len(self.toys) == len(ISLANDS) and all(
            epoch.has(name, toy.incarnation) and beats[name].incarnation == toy.incarnation and beats[name].epoch == epoch.number
            for name, toy in self.toys.items()
        )

    def until(self, holds: Callable[[], bool], what: str) -> None:
        limit = time.monotonic() + 200
        while not holds():
            assert not any(toy.rows("crash") for toy in self.toys.values()), self.toys
            assert time.monotonic() < limit, what
            time.sleep(0.02)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seed", "faults", "more"), [(0, FAULTS[1:4], 0), *(pytest.param(seed, FAULTS, 3, marks=pytest.mark.long) for seed in range(3))]
)
def test_islands_agree_whatever_happens_to_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, faults: tuple[str, ...], more: int
) -> None:
    """One island joins late; then come the faults, and `more` of any kind, in any order."""
    links, rng = Links(tmp_path / "links.json"), random.Random(seed)
    install(links, monkeypatch.setattr)
    fleet = Fleet(tmp_path)
    for name in ISLANDS[:2]:
        fleet.start(name)
    fleet.until(lambda: fleet.board.epoch() is not None, "two islands begin")
    fleet.start(ISLANDS[2])
    fleet.until(fleet.are_all_members, "the third joins")
    # What the first steps import takes its time, and is no wait.
    fleet.waits.clear()
    order = [*faults, *rng.choices(FAULTS, k=more)]
    rng.shuffle(order)
    for number, fault in enumerate(order):
        fleet.until(fleet.are_all_members, f"all are there before {fault}, the {number}. of {order}")
        time.sleep(rng.uniform(0.0, 0.4))
        name, other = rng.sample(ISLANDS, 2)
        epoch = fleet.board.epoch().number
        match fault:
            case "crash" | "crash of the coordinator":
                name = name if fault == "crash" else fleet.board.lease().island
                fleet.orders[name] = "crash"
                thread = next(thread for thread in reversed(fleet.threads) if thread.name == name)
                fleet.until(lambda thread=thread: not thread.is_alive(), f"{name} crashes")
                fleet.start(name)
            case "stall":
                fleet.orders[name] = "stall"
                fleet.until(lambda epoch=epoch: fleet.board.epoch().number > epoch, f"the others go on without {name}")
            case "cut" | "silent cut":
                links.set(cut=[[name, other]], silent=fault == "silent cut")
                fleet.until(lambda pair={name, other}: not pair <= {*fleet.board.epoch().members}, f"{name} and {other} part")
                links.set(cut=[])
            case "damage":
                links.set(damaged={name: rng.choice((1, 3))})
    fleet.until(fleet.are_all_members, "all are there at the end")
    last = max(beat.step for beat in fleet.board.beats().values())
    fleet.over = True
    finish(*fleet.threads)
    check_same(*fleet.toys.values())
    print(f"{order}: {fleet.board.epoch().number} epochs, step {last} of {STEPS} after the last")
    print(f"longest wait of a member {max(fleet.waits):.2f} s")
    assert last < STEPS
