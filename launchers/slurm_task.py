"""What srun starts for each task: one worker, its place in the gang read from Slurm, its signals passed on, its death explained.

`python -m factory_train.launchers.slurm_task STAGE`, with the orders of the batch script in the environment.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from types import FrameType

from factory_train import storage
from factory_train.errors import ExitCode
from factory_train.launchers import autopsy
from factory_train.launchers.child import Child
from factory_train.launchers.environment import child_environ
from factory_train.launchers.fabric import fabric_environ
from factory_train.launchers.job import MAIN_GANG, WorkerEnv
from factory_train.launchers.slurm_first_node import FirstNode
from factory_train.launchers.slurm_islands import own_cards

# Passed on to the worker. Slurm sends them to every process of a step, or to this one alone: twice is as good as once.
_PASSED_ON = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
# A worker that saved and stopped has done well: srun must not end its peers, which are about to do the same.
_WELL = (ExitCode.OK, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)


def place(environ: Mapping[str, str], orders: WorkerEnv) -> WorkerEnv:
    """Returns the orders with this task's place in them.

    Args:
        environ: as srun sets it.
        orders: of the batch script; `local_world_size` is the tasks of each node.
    """
    return replace(
        orders,
        rank=int(environ["SLURM_PROCID"]),
        local_rank=int(environ["SLURM_LOCALID"]),
        world_size=int(environ["SLURM_NTASKS"]),
        lifeline=1,
    )


def main() -> int:
    """Runs one worker to its end and returns the code srun is to see."""
    stage = sys.argv[1]
    worker = place(os.environ, WorkerEnv.from_environ())
    attempt = worker.open_attempt()
    spec = storage.read_json(attempt.launch / "slurm.json")
    name = f"rank-{worker.rank:05d}" if stage == "train" else stage
    network = fabric_environ(spec["fabric"], spec["interface"], attempt.path / "logs") if stage == "train" else {}
    share = spec.get("share")
    if share and (cards := own_cards(os.environ.get("CUDA_VISIBLE_DEVICES"), share, worker.local_world_size)) is not None:
        network["CUDA_VISIBLE_DEVICES"] = cards
    # An island within one machine talks to others, which may be elsewhere.
    one_machine = worker.world_size == worker.local_world_size and worker.gang == MAIN_GANG
    environ = child_environ(os.environ, {**network, **spec["environ"]}, worker, one_machine=one_machine)
    early: list[int] = []
    for signum in _PASSED_ON:
        signal.signal(signum, lambda number, frame: early.append(number))
    # A rank has its own handlers and unblocks these signals when they are in place: none is lost before, none ends it.
    blocked = _PASSED_ON if stage == "train" else ()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        child = Child.start(name, worker.rank, spec["worker_module"], [stage], environ, attempt.log_path(name))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def pass_on(signum: int, frame: FrameType | None) -> None:
        early.append(signum)
        if child.process.returncode is None:
            child.signal(signum)

    for signum in _PASSED_ON:
        signal.signal(signum, pass_on)
    for number in early[:]:
        child.signal(number)
    # Islands that share a job, and their launcher on its first node.
    first_node = FirstNode(attempt, os.environ["SLURM_JOB_ID"]) if share and stage == "train" and worker.rank == 0 else None
    while child.process.poll() is None:
        if first_node is not None:
            first_node.look()
        time.sleep(0.05)
    child.sweep()
    code = child.process.returncode
    if code == 0 and worker.rank == 0:
        # srun has been seen to end well although its tasks had not: when Slurm believed their node lost.
        (attempt.launch / f"{stage}.done").touch()
    if code == 0 or (stage == "train" and code in _WELL):
        return 0
    if early and (code in _WELL or -code in early):
        return int(ExitCode.PREEMPTED)
    autopsy.record(attempt, stage, child)
    return code if code > 0 else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
