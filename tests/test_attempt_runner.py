"""One attempt on a scheduler's machines, with a launcher that starts nothing: stages, stops, and the verdict that follows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import new_run

from factory_train import switches
from factory_train.errors import PreflightError
from factory_train.launchers.attempt_runner import AttemptRunner, Stop
from factory_train.launchers.job import WorkerEnv
from factory_train.run_dir import Attempt

SPEC = {
    "gang": {"name": "main", "nodes": 2, "tasks_per_node": 2},
    "stages": ["prepare", "train", "finish"],
    "tracker": False,
    "environ": {},
    "grace_s": 0.2,
    "hang_s": 0.0,
    "stall_s": 0.0,
}


class Quiet:
    """An inbox that nothing comes into."""

    stop = None

    def wait(self, timeout_s: float) -> None:
        time.sleep(min(timeout_s, 0.02))


class Scripted(AttemptRunner):
    """Every stage ends at once with the code its script says; None runs until it is ended, an error keeps it from starting."""

    def __init__(self, attempt: Attempt, script: dict[str, int | Exception | None], stop: Stop | None = None) -> None:
        quiet: Any = Quiet()
        super().__init__(attempt, SPEC, quiet, None)
        self._script, self._wanted_stop, self._stage = script, stop, ""
        self.started: list[tuple[str, WorkerEnv]] = []
        self.told: list[str] = []
        self.goes_on: bool | None = None

    def _start(self, stage: str, orders: WorkerEnv) -> None:
        self._stage = stage
        self.started.append((stage, orders))
        code = self._script.get(stage, 0)
        if isinstance(code, Exception):
            raise code
        if code == 0:
            (self._attempt.launch / f"{stage}.done").touch()

    def _poll(self) -> int | None:
        code = self._script.get(self._stage, 0)
        assert not isinstance(code, Exception)
        return code

    def _stop(self) -> Stop | None:
        return self._wanted_stop if self._stage == "train" else None

    def _end(self) -> None:
        self._script = {**self._script, self._stage: -9}

    def _tell_ranks(self, name: str) -> None:
        self.told.append(name)

    def _master(self) -> str:
        return "node1"

    def _host_of(self, rank: int) -> str:
        return f"node{rank // 2 + 1}"

    def _place(self) -> dict[str, Any]:
        return {"nodes": ["node1", "node2"]}

    def _unexplained(self, code: int) -> str:
        return f"ended with {code}"

    def _after(self, *, goes_on: bool) -> None:
        self.goes_on = goes_on


def concluded(attempt: Attempt) -> tuple[str, int, str]:
    verdict = attempt.verdict()
    assert verdict is not None
    return verdict.outcome, verdict.exit_code, verdict.reason


def test_stages_run_in_order_and_only_training_gets_the_whole_gang(tmp_path: Path) -> None:
    runner = Scripted(new_run(tmp_path), {})
    assert runner.run() == 0
    assert [(stage, orders.local_world_size, orders.master_addr) for stage, orders in runner.started] == [
        ("prepare", 1, "127.0.0.1"),
        ("train", 2, "node1"),
        ("finish", 1, "127.0.0.1"),
    ]
    assert runner.goes_on is False


@pytest.mark.parametrize(
    ("code", "outcome", "exit_code", "goes_on"),
    [(1, "failed-transient", 1, True), (2, "failed-user", 2, False), (75, "preempted", 75, True)],
)
def test_a_stage_that_ends_badly_is_the_last(tmp_path: Path, code: int, outcome: str, exit_code: int, goes_on: bool) -> None:
    attempt = new_run(tmp_path)
    runner = Scripted(attempt, {"prepare": code})
    assert runner.run() == exit_code
    assert concluded(attempt)[:2] == (outcome, exit_code)
    assert (len(runner.started), runner.goes_on) == (1, goes_on)


@pytest.mark.parametrize(
    ("error", "outcome", "exit_code", "goes_on"),
    [
        (OSError("no room on the disk"), "failed-transient", 1, True),
        (PreflightError("cannot listen there", where="tcp://host:80"), "failed-user", 3, False),
    ],
    ids=["machine", "user"],
)
def test_a_stage_that_cannot_be_started_has_a_verdict_that_says_why(
    tmp_path: Path, error: Exception, outcome: str, exit_code: int, goes_on: bool
) -> None:
    attempt = new_run(tmp_path)
    runner = Scripted(attempt, {"train": error})
    assert (runner.run(), runner.goes_on) == (exit_code, goes_on)
    found, _, reason = concluded(attempt)
    assert (found, error.args[0] in reason) == (outcome, True)


@pytest.mark.parametrize(("name", "outcome", "goes_on"), [("TERM", "failed-transient", True), ("INT", "killed", False)])
def test_ranks_that_do_not_save_in_time_are_ended(tmp_path: Path, name: str, outcome: str, goes_on: bool) -> None:
    attempt = new_run(tmp_path)
    runner = Scripted(attempt, {"train": None}, Stop(name, "asked to"))
    runner.run()
    assert runner.told == [name]
    assert concluded(attempt)[0] == outcome
    assert "is lost" in concluded(attempt)[2]
    assert runner.goes_on is goes_on


def test_a_stop_switch_before_the_first_stage_starts_nothing(tmp_path: Path) -> None:
    attempt = new_run(tmp_path)
    switches.turn_on(attempt.run, switches.STOP)
    runner = Scripted(attempt, {})
    assert runner.run() == 130
    assert not runner.started


def test_a_superseded_attempt_writes_no_verdict(tmp_path: Path) -> None:
    attempt = new_run(tmp_path)
    runner = Scripted(attempt, {"prepare": None})
    attempt.run.new_attempt(attempt.config())
    assert runner.run() == 1
    assert attempt.verdict() is None
    assert runner.goes_on is None
