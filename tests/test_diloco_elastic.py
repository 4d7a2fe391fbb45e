"""Islands that leave, come late, join and come back: the others lose nothing and all end with the same outer parameters."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_links import Links, install
from toy_islands import Toy, config, equal, run_toys, train

from factory_train.distributed.board import BROKEN, FolderBoard, Lease
from factory_train.errors import FactoryTrainError, IntegrityError

# Silence and grace where a test waits for their end; an island's threads must not be kept from running for so long.
SILENT_S, LATE_S = 6.0, 5.0


class LeavesError(Exception):
    """What ends an island in these tests."""


def leave_at(when: int):
    def before_step(toy: Toy, step: int) -> None:
        time.sleep(0.01)
        if step == when:
            raise LeavesError

    return before_step


def unhurried(until: Callable[[], Any]):
    """Trains on slowly, and slower and slower, until something has happened: however busy the machine is, it does before the end."""

    def before_step(toy: Toy, step: int) -> None:
        if not until():
            time.sleep(0.02 if step < toy.steps / 2 else 1.0)

    return before_step


def start(toy: Toy, ends: type[BaseException] | None = None) -> threading.Thread:
    """Runs an island in a thread; it may end with the exception that is given."""

    def run() -> None:
        try:
            toy.run()
        except BaseException as error:
            if ends is None or not isinstance(error, ends):
                toy.events.append(("crash", {"error": repr(error)}))
                raise

    thread = threading.Thread(target=run, name=toy.name, daemon=True)
    thread.start()
    return thread


def finish(*threads: threading.Thread, timeout_s: float = 240.0) -> None:
    limit = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
        assert not thread.is_alive(), "an island hangs"


def check_same(*toys: Toy) -> None:
    assert not any(toy.rows("crash") for toy in toys)
    for kind in ("outer", "momentum"):
        assert all(equal(toys[0].outer.state.named(kind), toy.outer.state.named(kind)) for toy in toys)


@pytest.mark.parametrize("settings", [{}, {"sync_every": 6, "fragments": 3, "delay": 2, "payload": "int8"}], ids=["classic", "streaming"])
@pytest.mark.parametrize("leaves", [0, 1])
def test_when_an_island_leaves_the_others_lose_no_step(tmp_path: Path, settings: dict, leaves: int) -> None:
    cfg = config(islands=3, **settings)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 30) for index in range(3)]
    toys[leaves].before_step = leave_at(9)
    threads = [start(toy, LeavesError if index == leaves else None) for index, toy in enumerate(toys)]
    finish(*threads)
    others = [toy for index, toy in enumerate(toys) if index != leaves]
    check_same(*others)
    assert all(len(toy.samples) == 30 for toy in others)
    assert others[0].rows("sync")[0]["members"] == 3
    assert others[0].rows("sync")[-1]["members"] == 2
    # What the lost island had not brought in was dealt again, and nothing else twice.
    seen = Counter(sample for toy in others for sample in toy.samples)
    assert max(seen.values()) == 1
    (epoch,) = [row for toy in toys for row in toy.rows("diloco-epoch") if row["epoch"] == 2]
    assert f"island-{leaves} left" in epoch["message"]


@pytest.mark.parametrize("settings", [{}, {"sync_every": 6, "fragments": 3, "delay": 2, "payload": "int8"}], ids=["classic", "streaming"])
def test_an_island_that_comes_back_takes_over_the_state_and_goes_on(tmp_path: Path, settings: dict) -> None:
    cfg = config(islands=3, **settings)
    again = Toy(tmp_path, "island-2", cfg, 120, incarnation=2)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 120, before_step=unhurried(lambda: again.rows("diloco-joined"))) for index in range(3)]
    toys[2].before_step = leave_at(9)
    threads = [start(toy, LeavesError if index == 2 else None) for index, toy in enumerate(toys)]
    threads[2].join(60)
    finish(*threads[:2], start(again))
    check_same(toys[0], toys[1], again)
    (joined,) = again.rows("diloco-joined")
    assert 9 < joined["step"] < 120
    rows = again.rows("sync")
    # It weighs nothing in a fragment that it has not trained for a whole period.
    assert [row["counted"] for row in rows[:4]] == ([1] * 4 if not settings else [0, 0, 0, 1])
    assert rows[-1]["counted"]
    assert rows[-1]["members"] == 3
    seen = Counter(sample for toy in (toys[0], toys[1], again) for sample in toy.samples)
    assert max(seen.values()) == 1


def test_a_late_island_is_left_behind_and_joins_again(tmp_path: Path) -> None:
    cfg = config(islands=3, grace_s=LATE_S)
    board = FolderBoard(tmp_path)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 160) for index in range(3)]
    toys[0].before_step = toys[2].before_step = unhurried(lambda: toys[1].rows("diloco-joined"))

    def sleep(toy: Toy, step: int) -> None:
        while step == 10 and board.epoch().has(toy.name, 1):
            time.sleep(0.05)

    toys[1].before_step = sleep
    finish(*map(start, toys))
    check_same(*toys)
    assert toys[1].rows("diloco-left-behind")
    assert toys[1].rows("diloco-joined")
    assert [len(toy.samples) for toy in (toys[0], toys[2])] == [160, 160]
    longest = max(row["waited_s"] for row in toys[0].rows("sync"))
    print(f"the others waited {longest:.2f} s at most")


@pytest.mark.long
def test_a_crash_of_the_coordinator_is_noticed_by_its_silence(tmp_path: Path) -> None:
    # Whoever was there first coordinates.
    cfg = config(islands=3, silence_s=SILENT_S)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 60) for index in range(3)]
    board = FolderBoard(tmp_path)
    crashed: list[Lease] = []

    def crash(toy: Toy, step: int) -> None:
        lease = board.lease()
        assert lease is not None
        if step == 13 and lease.island == toy.name:
            crashed.append(lease)
            # As a killed process: no last word, connections closed.
            toy.outer._exchange._membership._closed.set()
            toy.outer._exchange._wire.close()
            raise LeavesError

    for toy in toys:
        toy.before_step = crash
    finish(*[start(toy, LeavesError) for toy in toys])
    (old,) = crashed
    others = [toy for toy in toys if toy.name != old.island]
    check_same(*others)
    assert [row["lease"] for toy in others for row in toy.rows("diloco-coordinator")] == [old.number + 1]
    assert any(f"{old.island} silent" in row["message"] for toy in others for row in toy.rows("diloco-epoch"))
    assert all(len(toy.samples) == 60 for toy in others)


def test_an_island_without_a_sign_of_life_is_waited_for_no_longer(tmp_path: Path) -> None:
    """A machine without power closes no connection: the others must not wait as long as for an island that lives."""
    cfg = config(islands=3, silence_s=SILENT_S, grace_s=600.0)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 60) for index in range(3)]
    others_done = threading.Event()

    def freeze(toy: Toy, step: int) -> None:
        if step == 13:
            toy.outer._exchange._membership._closed.set()
            assert others_done.wait(300)
            raise LeavesError

    toys[1].before_step = freeze
    frozen, *others = [start(toy, LeavesError) for toy in (toys[1], toys[0], toys[2])]
    finish(*others)
    others_done.set()
    finish(frozen)
    check_same(toys[0], toys[2])
    assert [len(toy.samples) for toy in toys] == [60, 13, 60]
    assert any("island-1 silent for 6 s" in row["message"] for toy in toys for row in toy.rows("diloco-epoch"))


def test_fewer_than_the_quorum_do_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factory_train.distributed.exchange.QUORUM_WAIT_GRACES", 1.0)
    cfg = config(islands=2, quorum=2, grace_s=1.0)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 30) for index in range(2)]
    toys[1].before_step = leave_at(9)
    failures = []

    def run() -> None:
        try:
            toys[0].run()
        except FactoryTrainError as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    finish(thread, start(toys[1], LeavesError))
    assert "diloco.quorum=2" in str(failures[0])


@pytest.mark.parametrize("kind", ["outer", "momentum"])
def test_a_flipped_bit_stops_the_run_and_names_fragment_step_and_islands(tmp_path: Path, kind: str) -> None:
    cfg = config(islands=3, sync_every=6, fragments=3, payload="int8")
    toys = [Toy(tmp_path, f"island-{index}", cfg, 40) for index in range(3)]

    def flip(toy: Toy, step: int) -> None:
        if step == 9:
            toy.outer.state.named(kind)["layers.1.w"].view(torch.int32)[7] ^= 1

    toys[2].before_step = flip
    with pytest.raises(IntegrityError) as caught:
        run_toys(toys)
    assert "island-0, island-1 against island-2" in str(caught.value)
    assert "fragment" in str(caught.value)
    assert "step" in str(caught.value)


def test_an_island_whose_parameters_are_not_finite_is_left_out_and_mended(tmp_path: Path) -> None:
    cfg = config(islands=3, payload="int8")
    toys = [Toy(tmp_path, f"island-{index}", cfg, 20) for index in range(3)]

    def poison(toy: Toy, step: int) -> None:
        if step == 6:
            toy.values["layers.1.w"][3] = float("nan")

    toys[1].before_step = poison
    run_toys(toys)
    check_same(*toys)
    assert all(value.isfinite().all() for toy in toys for value in toy.values.values())
    assert [row["counted"] for row in toys[1].rows("sync")] == [1, 0, 1, 1, 1]


def test_after_a_link_was_cut_and_is_back_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is mended within the grace time costs no more than the wait."""
    links = Links(tmp_path / "links.json")
    install(links, monkeypatch.setattr)
    cfg = config(islands=2, sync_every=6, fragments=3, delay=2, payload="int4", grace_s=60.0)
    toys = [Toy(tmp_path / "cut", f"island-{index}", cfg, 60) for index in range(2)]
    (tmp_path / "cut").mkdir()
    board = FolderBoard(tmp_path / "cut")

    def mend() -> None:
        while not all(beat.state == BROKEN and beat.reaches == [] for beat in board.beats().values()):
            time.sleep(0.05)
        links.set(cut=[])

    def cut(toy: Toy, step: int) -> None:
        if step == 20:
            links.set(cut=[["island-0", "island-1"]])
            threading.Thread(target=mend, daemon=True).start()

    toys[0].before_step = cut
    run_toys(toys)
    check_same(*toys)
    assert toys[0].outer.epoch.number > 1
    assert not any(toy.rows("diloco-left-behind") for toy in toys)
    undisturbed = train(tmp_path / "whole", cfg=cfg, steps=60)
    assert equal(toys[0].values, undisturbed[0].values), "the same codes were sent again"


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silent"])
def test_where_a_link_stays_cut_the_largest_part_goes_on_and_the_rest_joins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    links = Links(tmp_path / "links.json")
    install(links, monkeypatch.setattr)
    cfg = config(islands=3, grace_s=LATE_S)
    board = FolderBoard(tmp_path)
    toys = [Toy(tmp_path, f"island-{index}", cfg, 160) for index in range(3)]
    back = lambda: any(toy.rows("diloco-joined") for toy in toys)  # noqa: E731
    crawl = unhurried(back)

    def cut(toy: Toy, step: int) -> None:
        if step == 9 and toy is toys[0]:
            links.set(cut=[["island-0", "island-2"]], silent=silent)
        parted = len(board.epoch().members) == 2
        if parted and links.get()["cut"] and step >= 20:
            links.set(cut=[])
        crawl(toy, step)

    for toy in toys:
        toy.before_step = cut
    finish(*map(start, toys))
    check_same(*toys)
    (outside,) = [toy for toy in toys if toy.rows("diloco-left-behind")]
    assert outside is not toys[1], "it reaches both others"
    assert [len(toy.samples) for toy in toys if toy is not outside] == [160, 160]
    (parting,) = [row for toy in toys for row in toy.rows("diloco-epoch") if "cannot reach" in row["message"]]
    assert f"{outside.name} cannot reach all others" in parting["message"]
    assert len(outside.rows("diloco-joined")) == 1
    # It was not let in, and no round failed for it, as long as the link was cut.
    assert max(row["members"] for row in toys[1].rows("sync") if row["step"] in (16, 20)) == 2
    assert toys[1].rows("sync")[-1]["members"] == 3
    print(f"the others waited {max(row['waited_s'] for row in toys[1].rows('sync')):.2f} s at most")


def test_who_comes_when_all_is_done_does_not_begin_anew(tmp_path: Path) -> None:
    cfg = config(islands=2)
    run_toys([Toy(tmp_path, f"island-{index}", cfg, 9) for index in range(2)])
    with pytest.raises(FactoryTrainError, match="the run is done: island-0"):
        run_toys([Toy(tmp_path, "island-1", replace(cfg, grace_s=0.5), 9, incarnation=2)])
