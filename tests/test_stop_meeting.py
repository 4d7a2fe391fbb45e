"""Islands that are all told to stop do so at one step, and none waits for long for one that was not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from factory_train.diloco_schedule import Schedule
from factory_train.distributed.board import Beat, FolderBoard, Told
from factory_train.distributed.stop_meeting import StopMeeting

MEMBERS = {"island-0": 3, "island-1": 1, "island-2": 7}
# Rounds are sent every 4 steps and applied one step later.
SCHEDULE = Schedule(2, 8, 1, 1000)


def meeting(folder: Path, island: str, schedule: Schedule = SCHEDULE) -> StopMeeting:
    return StopMeeting(FolderBoard(folder), island, MEMBERS[island], schedule)


def stop(
    folder: Path, told: dict[str, int], step_s: float | dict[str, float], schedule: Schedule = SCHEDULE, start: dict[str, int] | None = None
) -> dict[str, int]:
    """Trains islands, a thread each, no further than rounds allow, and returns where they stop.

    Args:
        told: the step at which each is told.
        step_s: what a step takes, to each.
        start: where they begin; where they are told unless given.
    """
    start = start or told
    ended, sent = {}, {island: step - 1 for island, step in start.items()}
    board = FolderBoard(folder)

    def exchange(island: str, step: int) -> None:
        sent[island] = step
        board.write_beat(Beat(island, MEMBERS[island], step=step))
        moment = schedule.at(step)
        for item in (*moment.apply, *moment.drain):
            while min(sent.values()) < item.sent:
                time.sleep(0.001)

    def train(island: str, step: int) -> None:
        mine = meeting(folder, island, schedule=schedule)
        mine_s = step_s[island] if isinstance(step_s, dict) else step_s
        for earlier in range(step, told[island]):
            exchange(island, earlier)
            step = earlier + 1
        while (stops_at := mine.stops_at(step, MEMBERS, mine_s, wait_s=60.0)) is None:
            exchange(island, step)
            step += 1
        assert stops_at >= step
        for later in range(step, stops_at):
            exchange(island, later)
        sent[island] = ended[island] = stops_at

    threads = [threading.Thread(target=train, args=item, daemon=True) for item in start.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return ended


def test_the_furthest_step_is_everybodys(tmp_path: Path) -> None:
    """Rounds are far away where steps are slow, so they meet where they are."""
    assert stop(tmp_path, {"island-0": 35, "island-1": 36, "island-2": 33}, step_s=1.5) == dict.fromkeys(MEMBERS, 36)


def test_where_steps_are_quick_they_stop_behind_a_round(tmp_path: Path) -> None:
    found = stop(tmp_path, {"island-0": 35, "island-1": 35, "island-2": 35}, step_s=0.01)
    # Sent after step 36, applied after step 37.
    assert found == dict.fromkeys(MEMBERS, 38)
    at_once = stop(tmp_path / "classic", {"island-0": 34, "island-1": 34, "island-2": 34}, 0.01, Schedule(1, 4, 0, 1000))
    assert at_once == dict.fromkeys(MEMBERS, 37), "sent and applied after step 36"


def test_one_that_is_told_late_need_not_wait_for_one_that_was_told_early(tmp_path: Path) -> None:
    """Between them is a round, so the first goes on, or the second would wait for its part and never hear."""
    found = stop(tmp_path, {"island-0": 38, "island-1": 33, "island-2": 37}, step_s=0.01)
    assert found == dict.fromkeys(MEMBERS, 42)


def test_one_that_stands_goes_on_where_another_waits_for_its_part(tmp_path: Path) -> None:
    """The other is blocked behind a round, and is only told after that."""
    found = stop(
        tmp_path, {"island-0": 35, "island-1": 39, "island-2": 36}, step_s=1.5, start={"island-0": 35, "island-1": 36, "island-2": 36}
    )
    assert found == dict.fromkeys(MEMBERS, 39)


@pytest.mark.parametrize("late", sorted(MEMBERS))
def test_they_agree_where_only_one_finds_the_round_near(tmp_path: Path, late: str) -> None:
    """The time of a step is what each measures."""
    told = {"island-0": 34, "island-1": 35, "island-2": 35} | {late: 38}
    found = stop(tmp_path, told, {"island-0": 0.7, "island-1": 0.01, "island-2": 0.7}, start=dict.fromkeys(MEMBERS, 34))
    assert found == dict.fromkeys(MEMBERS, 42)


def test_all_that_were_told_count(tmp_path: Path) -> None:
    board = FolderBoard(tmp_path)
    board.write_stop("island-1", MEMBERS["island-1"], Told(33, near=True))
    mine = meeting(tmp_path, "island-0")
    assert mine.stops_at(35, MEMBERS, 0.01, wait_s=60.0) is None
    board.write_stop("island-2", MEMBERS["island-2"], Told(37, near=True))
    assert mine.stops_at(36, MEMBERS, 0.01, wait_s=60.0) == 42
    assert {name: said.step for name, said in board.stops(MEMBERS).items()} == {"island-0": 35, "island-1": 33, "island-2": 37}


def test_an_island_that_was_not_told_keeps_none_waiting(tmp_path: Path) -> None:
    began = time.monotonic()
    assert meeting(tmp_path, "island-0").stops_at(34, MEMBERS, 1.5, wait_s=0.2) == 34
    assert time.monotonic() - began >= 0.2
    assert meeting(tmp_path, "island-0").stops_at(34, {"island-0": 3}, 1.5) == 34, "alone there is nobody to wait for"


@pytest.mark.parametrize(("behind", "stops_at"), [(3, 36), (4, 32)])
def test_catching_up_takes_seconds_and_no_longer(tmp_path: Path, behind: int, stops_at: int) -> None:
    FolderBoard(tmp_path).write_stop("island-1", MEMBERS["island-1"], Told(36, near=False))
    assert meeting(tmp_path, "island-0").stops_at(36 - behind, MEMBERS, 1.5, wait_s=0.0) == stops_at


def test_what_an_earlier_attempt_of_an_island_said_counts_for_nothing(tmp_path: Path) -> None:
    FolderBoard(tmp_path).write_stop("island-1", MEMBERS["island-1"] - 1, Told(90, near=True))
    mine = meeting(tmp_path, "island-0")
    assert mine.stops_at(35, {"island-0": 3, "island-1": 1}, 0.01, wait_s=60.0) is None
    assert mine.stops_at(38, {"island-0": 3, "island-1": 1}, 0.01, wait_s=0.0) == 38
