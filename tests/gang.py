"""Runs attempts in real worker processes with gloo, several one after another in the same processes.

`run_gang` starts as many Python processes as the largest world needs; each imports torch once and then joins every
attempt whose world it belongs to, through the very function a launcher's worker calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from factory_train.config import Config
from factory_train.run_dir import Attempt, RunDir


def start_run(root: Path, name: str, cfg: Config) -> Attempt:
    """Makes a run directory with its data prepared, ready for `run_gang`."""
    from factory_train.recipes.pretrain import prepare

    run_path = root / f"{cfg.recipe}-{name}"
    run = RunDir.open(run_path) if run_path.exists() else RunDir.create(root, cfg.recipe, name)
    attempt = run.new_attempt(cfg)
    prepare(cfg, attempt)
    return attempt


def run_gang(attempts: list[tuple[Attempt, int]], timeout_s: float = 240.0) -> None:
    """Trains each attempt in its world size, in order.

    Raises:
        AssertionError: a process failed; its output is in the message.
    """
    orders = json.dumps([{"run_dir": str(attempt.run.path), "attempt": attempt.number, "world": world} for attempt, world in attempts])
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), orders], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(max(world for _, world in attempts))
    ]
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=timeout_s)[0])
    finally:
        for process in processes:
            process.kill()
    failures = [output for process, output in zip(processes, outputs, strict=True) if process.returncode]
    assert not failures, failures[0]


def _work(rank: int, orders: list[dict]) -> None:
    from factory_train.launchers.job import WorkerEnv
    from factory_train.preemption import StopSignal
    from factory_train.recipes.pretrain import train

    for order in orders:
        world = order["world"]
        if rank < world:
            env = WorkerEnv(order["run_dir"], order["attempt"], rank=rank, local_rank=rank, world_size=world, local_world_size=world)
            attempt = env.open_attempt()
            assert train(attempt.config(), attempt, env, StopSignal()) == 0


if __name__ == "__main__":
    _work(int(sys.argv[1]), json.loads(sys.argv[2]))
