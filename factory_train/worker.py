"""What a launcher starts: one stage of a job, in one process (`python -m factory_train.worker STAGE`).

Its orders are the `WorkerEnv` variables and the frozen configuration of the attempt; its answers are its exit code,
its log, and on failure the attempt's ERROR.json.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
import traceback
from typing import NoReturn

from factory_train import heartbeat, plugins
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, FencedError
from factory_train.launchers.job import STAGES, WorkerEnv
from factory_train.launchers.lifeline import end_with_launcher
from factory_train.preemption import Deadline, StopSignal
from factory_train.run_dir import Attempt

# About every quarter of a minute: a rank of a lost node that still runs finds out that it was replaced.
_FENCE_EVERY_BEATS = 3


def main(argv: list[str]) -> int:
    """Runs the stage named by `argv` and returns its exit code."""
    if len(argv) != 1 or argv[0] not in STAGES:
        raise ConfigError(f"usage: python -m factory_train.worker {'|'.join(STAGES)}", where="worker")
    stage = argv[0]
    # Signals first: importing torch takes seconds in which a stop request must not be lost.
    stop = StopSignal()
    if stage == "train":
        stop.install()
    env = WorkerEnv.from_environ()
    attempt = env.open_attempt()
    if env.lifeline:
        end_with_launcher()
    _show_life(stage, env, attempt, stop)
    try:
        cfg = attempt.config()
        plugins.load(cfg.plugins)
        program = importlib.import_module(f"factory_train.recipes.{cfg.program}")
        if stage == "train":
            return int(program.train(cfg, attempt, env, stop))
        return int(getattr(program, stage)(cfg, attempt))
    except FencedError as error:
        # A newer attempt owns the run now; this one leaves without a trace in it.
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except Exception as error:
        return _record_failure(error, stage, env, attempt)


def _record_failure(error: Exception, stage: str, env: WorkerEnv, attempt: Attempt) -> int:
    traceback.print_exc()
    exit_code = error.exit_code if isinstance(error, FactoryTrainError) else ExitCode.FAILED
    attempt.record_error(
        {
            "stage": stage,
            "rank": env.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "type": type(error).__name__,
            "message": error.what if isinstance(error, FactoryTrainError) else str(error),
            "where": error.where if isinstance(error, FactoryTrainError) else None,
            "hint": _hint(error),
            "by_user": isinstance(error, FactoryTrainError) and error.by_user,
            "traceback": traceback.format_exc(),
        }
    )
    return int(exit_code)


def _hint(error: Exception) -> str | None:
    """Returns what a person could change, if the error itself tells."""
    if isinstance(error, FactoryTrainError):
        return error.fix
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        # Training itself tells more (diagnostics/out_of_memory.py); this is for the stages around it.
        return "end other programs on this machine; evaluation needs less with train.micro_batch_size=1"
    if type(error).__name__ in ("DistBackendError", "DistNetworkError"):
        return "another rank ended first; its log tells why"
    if isinstance(error, OSError) and error.filename:
        return f"check that {error.filename} can be written and that its disk is not full"
    return None


def _show_life(stage: str, env: WorkerEnv, attempt: Attempt, stop: StopSignal) -> None:
    """Keeps this rank's heartbeat, and looks with each beat for what a rank must notice from outside."""
    if stage == "train" and env.rank == 0:
        # It alone knows how long saves took; the step's reduction tells the others.
        stop.deadline = Deadline.of(attempt, env.deadline)
    beats = 0

    def look() -> None:
        nonlocal beats
        beats += 1
        if env.rank == 0 and stage == "train":
            stop.look_at_switches(attempt)
        # One process a node: a listing for each rank would be a burden for the filesystem's metadata server.
        if env.local_rank == 0 and beats % _FENCE_EVERY_BEATS == 0 and not attempt.is_newest():
            print("error: a newer attempt of this run has begun; this one ends here", file=sys.stderr, flush=True)
            os._exit(ExitCode.FAILED)

    heartbeat.keep_beating(attempt.heartbeat_path(env.rank), stop.place, look)


def run() -> NoReturn:
    """Runs the stage and ends the process at once, with the exit code of the work it did.

    Native threads of torch and gloo sometimes want the interpreter while it shuts down and then abort the process: a
    rank that has done and saved everything would count as crashed.
    """
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
