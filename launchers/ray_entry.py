"""What Ray starts for a job: attempt after attempt, each in a process of its own, until one has a verdict that stands.

`python -m factory_train.launchers.ray_entry RUN_DIR ATTEMPT SUBMISSION_ID`. It imports no ray and holds nothing but a
child, so that whatever becomes of that child, this process can say so and start the next.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from factory_train import storage, switches
from factory_train.errors import ExitCode, FencedError
from factory_train.launchers import attempts, autopsy
from factory_train.launchers.child import Child, end_all, signal_name
from factory_train.launchers.inbox import Inbox
from factory_train.run_dir import Attempt, RunDir

# A lost node is noticed by Ray some seconds later; until then it would be given out again.
_PAUSE_S = 3.0
_DRIVER = "factory_train.launchers.ray_driver"


def run_attempt(attempt: Attempt, job_id: str, inbox: Inbox) -> int:
    """Runs one attempt to its end; returns its exit code. There is a verdict afterwards, whatever happened."""
    arguments = [str(attempt.run.path), str(attempt.number), job_id]
    child = Child.start("driver", 0, _DRIVER, arguments, os.environ, attempt.launch / "driver.log")
    passed_on = 0
    try:
        while child.running:
            for signum in inbox.received[passed_on:]:
                child.signal(signum)
                passed_on += 1
            inbox.wait(1.0)
        child.sweep()
    finally:
        end_all([child])
    if attempt.is_newest() and attempt.verdict() is None:
        with contextlib.suppress(OSError, FencedError):
            outcome, code, reason = _say_for(child, inbox)
            attempt.record_launch_event("driver-died", how=child.death())
            attempt.write_verdict(outcome, code, step=autopsy.last_step(attempt), reason=reason)
    verdict = attempt.verdict()
    return verdict.exit_code if verdict else ExitCode.FAILED


def _say_for(child: Child, inbox: Inbox) -> tuple[str, int, str]:
    if inbox.stop is not None:
        return "preempted", ExitCode.PREEMPTED, f"{inbox.why}, and the job was ended before its ranks could save"
    return "failed-transient", ExitCode.FAILED, f"the process that looks after the gang {child.death()}; see launch/driver.log"


def goes_on(attempt: Attempt, inbox: Inbox) -> bool:
    """Returns whether another attempt follows this one in the same job."""
    run, verdict = attempt.run, attempt.verdict()
    if verdict is None or verdict.outcome not in ("preempted", "failed-transient") or not attempt.is_newest():
        return False
    if inbox.stop is not None or switches.is_on(run, switches.STOP) or switches.is_on(run, switches.PREEMPT):
        return False
    if storage.read_json(attempt.launch / "ray.json")["requeue"] != "requeue":
        attempt.record_launch_event("no-restart", reason="launcher.requeue=never")
        return False
    return attempts.count_fruitless(run) < attempts.MOST_FRUITLESS and attempts.count_unbegun(run) < attempts.MOST_FRUITLESS


def main() -> int:
    """Runs attempts until one ends the job; returns what the last one exits with."""
    inbox = Inbox()
    # What SIGHUP means to a terminal it does not mean here.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Ray blocks it in all its processes, and what is blocked here is blocked in every rank.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    run, submitted, job_id = RunDir.open(Path(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
    code = int(ExitCode.OK)
    while (attempt := attempts.take(run, submitted, job_id)) is not None:
        code = run_attempt(attempt, job_id, inbox)
        if not goes_on(attempt, inbox):
            break
        verdict = attempt.verdict()
        saved = max(0, attempts.newest_checkpoint_step(run))
        lost = max(0, (verdict.step if verdict and verdict.step else 0) - saved)
        attempt.record_launch_event("restart", after=verdict.outcome if verdict else "?", checkpoint=saved, steps_to_repeat=lost)
        print(f"{run.name}: attempt {attempt.number}: {verdict.reason if verdict else signal_name(-code)}; another follows", flush=True)
        limit = time.monotonic() + _PAUSE_S
        while inbox.stop is None and time.monotonic() < limit:
            inbox.wait(limit - time.monotonic())
    return code


if __name__ == "__main__":
    sys.exit(main())
