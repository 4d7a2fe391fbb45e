"""One attempt of a Ray job, or of one of its islands: finds room, runs the stages on the nodes, and writes the verdict.

`python -m factory_train.launchers.ray_driver RUN_DIR ATTEMPT SUBMISSION_ID`, started by `ray_entry` on a node of the
cluster, or by the driver of the run for an island. When it dies, Ray ends its actors, and each ends its ranks.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import ray

from factory_train import storage, switches
from factory_train.errors import ExitCode
from factory_train.launchers.inbox import STOP_SIGNALS, Inbox
from factory_train.launchers.lifeline import end_with_launcher
from factory_train.launchers.pulse import Pulse
from factory_train.launchers.ray_attempt import RayAttempt
from factory_train.launchers.ray_gang import Placement
from factory_train.launchers.ray_islands import IslandsAttempt, Places
from factory_train.run_dir import Attempt, RunDir


def connect(attempt: Attempt, job_id: str) -> bool:
    """Joins the cluster this process was started in; writes the verdict when that cannot be."""
    try:
        # Ranks have logs of their own; what actors print is Ray's business. The drivers of a job's islands see its placement groups.
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), namespace=job_id, log_to_driver=False, logging_level="WARNING")
        return True
    except (RuntimeError, ConnectionError, ray.exceptions.RayError) as error:
        text = " ".join(str(error).split())
        # Another Ray or another Python: the next attempt would meet the same.
        by_user = "ersion mismatch" in text or isinstance(error, ray.exceptions.AuthenticationError)
        outcome, code = ("failed-user", ExitCode.PREFLIGHT) if by_user else ("failed-transient", ExitCode.UNAVAILABLE)
        attempt.write_verdict(outcome, code, step=None, reason=f"cannot join the Ray cluster: {text[:400]}")
        return False


def place(attempt: Attempt, job_id: str, inbox: Inbox, stopped: Callable[[], bool]) -> RayAttempt | IslandsAttempt | None:
    """Returns the attempt, ready to run, once it has its place; None when `stopped` says so first."""
    spec, beat = storage.read_json(attempt.launch / "ray.json"), Pulse(attempt).beat
    if spec["islands"]:
        places = Places(attempt, spec)
        return IslandsAttempt(attempt, job_id, places, inbox) if places.reserve(stopped, beat) else None
    gang = Placement(attempt, spec).wait(stopped, beat)
    return RayAttempt(attempt, job_id, gang, inbox) if gang else None


def main() -> int:
    """Runs one attempt and returns its exit code."""
    end_with_launcher()
    attempt, job_id = Attempt(RunDir.open(Path(sys.argv[1])), int(sys.argv[2])), sys.argv[3]
    # What comes before there is an inbox waits for it: ray.init takes SIGTERM for itself.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if not connect(attempt, job_id):
        return ExitCode.FAILED
    inbox = Inbox()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def stopped() -> bool:
        inbox.wait(0)
        return inbox.stop is not None or switches.is_on(attempt.run, switches.STOP) or switches.is_on(attempt.run, switches.PREEMPT)

    runner = place(attempt, job_id, inbox, stopped)
    if runner is None:
        by_person = switches.is_on(attempt.run, switches.STOP) or inbox.stop == signal.SIGINT
        outcome, code = ("interrupted", ExitCode.INTERRUPTED) if by_person else ("preempted", ExitCode.PREEMPTED)
        attempt.write_verdict(outcome, code, step=None, reason="stopped while it waited for room in the cluster")
        return code
    try:
        return runner.run()
    finally:
        runner.close()


def run() -> None:
    """Runs the attempt and ends the process at once: Ray's own threads have nothing to add to a verdict."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    ray.shutdown()
    os._exit(code)


if __name__ == "__main__":
    run()
