"""Which islands a launcher starts again, and how the training stage ends, with a starter that starts nothing."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import new_run

from factory_train.gangs import island_names
from factory_train.launchers.islands import Island, Islands, Running
from factory_train.launchers.pulse import Pulse
from factory_train.run_dir import Attempt, RunDir

CODES = {"done": 0, "preempted": 75, "interrupted": 130, "failed-transient": 1, "failed-user": 2}


@dataclass
class Started:
    """An attempt that goes on for as many looks as `looks` says."""

    attempt: Attempt
    outcome: str
    looks: int

    @property
    def running(self) -> bool:
        self.looks -= 1
        if self.looks == 0 and self.outcome in CODES:
            self.attempt.write_verdict(self.outcome, CODES[self.outcome], step=None, reason="so it was")
        return self.looks > 0

    def signal(self, signum: int) -> None:
        self.outcome, self.looks = ("preempted" if signum == signal.SIGTERM else "interrupted"), 2

    def death(self) -> str:
        return "exited with code 1"


class Script:
    """A starter whose attempts end as was written: for each island (looks, outcome) of one attempt after another.

    It is a `Requests` too: something asks to stop once every island has been started as often as the script has attempts.
    """

    def __init__(
        self, attempts: Sequence[Sequence[tuple[int, str]]], stop: signal.Signals | None = None, *, with_place: bool = True
    ) -> None:
        self._attempts, self._stop, self._with_place = [list(of_island) for of_island in attempts], stop, with_place
        self.started: list[str] = []
        self.at_once, self.why = None, "SIGTERM received"

    def start(self, island: Island, attempt: Attempt) -> Running:
        self.started.append(island.name)
        if self._with_place:
            attempt.record_launch_event("start", checkpoint=-1)
        looks, outcome = self._attempts[island.index].pop(0)
        return Started(attempt, outcome, looks)

    def end(self, started: Sequence[Running]) -> None:
        for one in started:
            assert isinstance(one, Started)
            one.looks = 0

    @property
    def stop(self) -> signal.Signals | None:
        return self._stop if not any(self._attempts) else None

    def wait(self, timeout_s: float) -> None:
        pass


def run(tmp_path: Path, script: Script) -> tuple[str, int, str]:
    attempt = new_run(tmp_path)
    gangs = [{"name": name, "nodes": 1, "tasks_per_node": 1} for name in island_names(2)]
    requests: Any = script
    return Islands(attempt, gangs, 60.0, requests, Pulse(attempt), attempt.record_launch_event, script).run()


@pytest.mark.parametrize("outcome", ["failed-transient", "preempted"])
def test_an_island_that_fails_or_is_told_to_go_comes_back_while_the_other_goes_on(tmp_path: Path, outcome: str) -> None:
    script = Script([[(3, outcome), (3, "done")], [(20, "done")]])
    assert run(tmp_path, script) == ("done", 0, "")
    assert script.started == ["island-0", "island-1", "island-0"]


def test_an_island_whose_launcher_died_without_a_word_gets_its_verdict_here(tmp_path: Path) -> None:
    script = Script([[(3, "no word"), (3, "done")], [(20, "done")]])
    assert run(tmp_path, script)[0] == "done"
    (island,) = tmp_path.rglob("island-0")
    first = RunDir.open(island).attempts()[0].verdict()
    assert first is not None
    assert (first.outcome, first.reason) == ("failed-transient", "its launcher exited with code 1")


def test_what_is_asked_of_all_is_the_end_of_all(tmp_path: Path) -> None:
    script = Script([[(50, "done")], [(50, "done")]], signal.SIGTERM)
    outcome, code, _ = run(tmp_path, script)
    assert (outcome, code) == ("preempted", 75)
    assert script.started == ["island-0", "island-1"]


def test_an_island_that_is_preempted_as_all_are_does_not_come_back(tmp_path: Path) -> None:
    """Its node was told as well, and it was faster than the request."""
    script = Script([[(1, "preempted")], [(50, "done")]], signal.SIGTERM)
    assert run(tmp_path, script)[0] == "preempted"
    assert script.started == ["island-0", "island-1"]


@pytest.mark.parametrize("with_place", [True, False])
def test_an_island_that_gets_nowhere_is_given_up_and_the_other_ends_the_run(tmp_path: Path, with_place: bool) -> None:
    script = Script([[(2, "failed-transient")] * 9, [(40, "done")]], with_place=with_place)
    assert run(tmp_path, script)[0] == "done"
    assert script.started.count("island-0") == 3


def test_a_mistake_of_one_island_is_that_of_all(tmp_path: Path) -> None:
    script = Script([[(3, "failed-user")], [(1000, "done")]])
    outcome, code, reason = run(tmp_path, script)
    assert (outcome, code) == ("failed-user", 2)
    assert reason == "island-0: so it was"


def test_one_that_is_behind_when_the_other_is_done_is_not_started_again(tmp_path: Path) -> None:
    script = Script([[(9, "failed-transient")], [(3, "done")]])
    assert run(tmp_path, script)[0] == "done"
    assert script.started == ["island-0", "island-1"]
