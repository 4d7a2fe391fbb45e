"""Runs the islands of runs in real processes, several runs one after another in the same processes.

Each process imports torch once and then trains its island, or one rank of it, through the very function a launcher's worker calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from conftest import REPOSITORY

from factory_train.config import Config
from factory_train.gangs import island_names, island_run, new_island_attempt
from factory_train.run_dir import Attempt, RunDir


def start_run(root: Path, name: str, cfg: Config) -> Attempt:
    """Makes the run, with its data prepared; its islands make their attempts themselves."""
    from factory_train.recipes.pretrain import prepare

    attempt = RunDir.create(root, cfg.recipe, name).new_attempt(cfg)
    prepare(cfg, attempt)
    return attempt


def run_islands(orders: list[dict[str, Any]], islands: int, ranks: int = 1, timeout_s: float = 200.0) -> None:
    """Carries out orders, one after another, with `ranks` processes an island: train the run in `run_dir`, maybe only up to `stop_at`.

    `before` says how many attempts the islands had before these processes.

    Raises:
        AssertionError: a process failed; its output is in the message.
    """
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, island, str(rank), str(ranks), json.dumps(orders)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for island in island_names(islands)
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failures = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failures, failures[0]


def _work(island: str, rank: int, ranks: int, orders: list[dict[str, Any]]) -> None:
    from factory_train.distributed import stop_meeting
    from factory_train.launchers.job import WorkerEnv
    from factory_train.preemption import StopSignal
    from factory_train.recipes.pretrain import train

    # They stop at the step they were told, not behind the next round.
    stop_meeting._NEAR_S = 0.0

    class StopAt(StopSignal):
        """Asks to stop so that the last completed step is `step`: the ranks learn of it one step late."""

        step: int | None = None

        def must_leave(self) -> bool:
            return self.step is not None and self.place.now[0] >= self.step - 2

    for order in orders:
        main = RunDir.open(Path(order["run_dir"]))
        _taken.setdefault(main.path, order.get("before", 0))
        attempt = _next_attempt(main, island, rank)
        env = WorkerEnv(str(attempt.run.path), attempt.number, island, rank, rank, ranks, ranks)
        stop = StopAt()
        stop.step = order.get("stop_at")
        code = train(attempt.config(), attempt, env, stop)
        assert code == (75 if stop.step is not None else 0), code


_taken: dict[Path, int] = {}


def _next_attempt(main: RunDir, island: str, rank: int) -> Attempt:
    """Rank 0 makes the next attempt of its island, the others wait for it."""
    number = _taken[main.path] = _taken.get(main.path, 0) + 1
    home = island_run(main, island)
    if rank == 0:
        attempt = new_island_attempt(main, island, main.attempts()[0].config())
        assert attempt.number == number
        return attempt
    while not (home.path / "attempts" / f"{number:04d}" / "config.yaml").exists():
        time.sleep(0.02)
    return Attempt(home, number)


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
