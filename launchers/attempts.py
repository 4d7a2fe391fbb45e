"""Which attempt a start of a job is, and whether another one would get any further."""

from __future__ import annotations

import re
import shutil

from factory_train import storage
from factory_train.errors import ExitCode
from factory_train.run_dir import Attempt, RunDir

# So many attempts in a row that end badly without a newer checkpoint, and there is no further one.
MOST_FRUITLESS = 3
# Outcomes after which a run goes on only when a person says so.
_FINAL = ("done", "interrupted", "failed-user", "killed")
_COPIED = ("plan.json", "code.json", "launch/slurm.json", "launch/ray.json")


def take(run: RunDir, submitted: int, job_id: str) -> Attempt | None:
    """Returns the attempt this start of a job is to run; None when there is nothing for it to do.

    The first start takes the attempt it was submitted with. A later one, after a requeue or as the next of a chain, makes
    a new attempt with the same frozen configuration and the same code.

    Args:
        submitted: number of the attempt the job was submitted with.
        job_id: of the job that starts.
    """
    last = run.last_attempt()
    assert last is not None
    job = storage.read_json(last.job_path)
    if last.number != submitted and (job is None or job_id not in job.get("job_ids", ())):
        print(f"{run.name}: attempt {last.number} belongs to another job; nothing to do")
        return None
    if storage.write_json_once(last.launch / "started.json", {"job_id": job_id}):
        return last
    verdict = last.verdict()
    if verdict is not None and verdict.outcome in _FINAL:
        print(f"{run.name}: {verdict.outcome}: {verdict.reason}; nothing to do")
        return None
    fruitless = count_fruitless(run)
    if fruitless >= MOST_FRUITLESS:
        reason = f"{fruitless} attempts in a row ended without a newer checkpoint; not tried again"
        last.write_verdict("failed-transient", ExitCode.FAILED, step=None, reason=reason)
        print(f"{run.name}: {reason}")
        return None
    attempt = run.new_attempt(last.config())
    for name in _COPIED:
        if (last.path / name).is_file():
            shutil.copyfile(last.path / name, attempt.path / name)
    storage.write_json(attempt.job_path, {**(job or {}), "attempt": attempt.number})
    storage.write_json_once(attempt.launch / "started.json", {"job_id": job_id})
    return attempt


def newest_checkpoint_step(run: RunDir) -> int:
    """Returns the step of the newest complete checkpoint, -1 when there is none."""
    names = [entry.name for entry in run.checkpoints.iterdir()] if run.checkpoints.is_dir() else []
    return max((int(name[5:]) for name in names if re.fullmatch(r"step-\d+", name)), default=-1)


def count_fruitless(run: RunDir) -> int:
    """Returns how many attempts in a row, up to now, ended badly and began at the checkpoint that is still the newest.

    What somebody submits anew counts from one. A preempted attempt is not the run's fault.
    """
    newest, count = newest_checkpoint_step(run), 0
    for attempt in reversed(run.attempts()):
        events = {event["event"]: event for event in attempt.events()}
        start, verdict = events.get("start"), attempt.verdict()
        if start is None or start.get("checkpoint") != newest:
            break
        if verdict is None or verdict.outcome == "failed-transient":
            count += 1
        if "submit" in events:
            break
    return count


def count_unbegun(run: RunDir) -> int:
    """Returns how many attempts in a row, up to now, ended badly before they had a place."""
    count = 0
    for attempt in reversed(run.attempts()):
        kinds = {event["event"] for event in attempt.events()}
        verdict = attempt.verdict()
        if "start" in kinds or verdict is None or verdict.outcome != "failed-transient":
            break
        count += 1
        if "submit" in kinds:
            break
    return count
