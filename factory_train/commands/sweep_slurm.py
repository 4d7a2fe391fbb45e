"""Points of a sweep on Slurm: one job array, of which Slurm runs a bounded number at once; nobody has to stay."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from factory_train.commands import submission
from factory_train.commands.submission import Started
from factory_train.commands.sweep_local import note
from factory_train.commands.sweep_point import Draft
from factory_train.commands.sweep_view import SweepView
from factory_train.errors import ExitCode
from factory_train.launchers.slurm import SlurmLauncher
from factory_train.sweep import DONE, PENDING, RUNNING, SweepDir, SweepRecord
from factory_train.sweep_results import read_point

_POLL_S = 1.0


def is_meant(drafts: Sequence[Draft]) -> bool:
    """Returns whether these points are for Slurm."""
    return drafts[0].request.config.launcher.name == SlurmLauncher.name


def describe(sweep: SweepDir, drafts: Sequence[Draft]) -> str:
    """Returns what would be submitted, for --dry-run."""
    left = {draft.point.number: draft.request for draft in drafts if not submission.is_finished(draft.request)}
    return submission.describe_array(left, sweep.name, _next_folder(sweep)) if left else "nothing to submit: every point has done its steps"


def next_commands(sweep: SweepDir) -> list[str]:
    """Returns the commands that make sense for a sweep that is in Slurm's hands."""
    name = shlex.quote(sweep.name)
    return [f"python -m factory_train {words}" for words in ("status", f"report {name}", f"sync {name}")]


def run_points(sweep: SweepDir, record: SweepRecord, drafts: Sequence[Draft], view: SweepView, received: Sequence[int]) -> list[int] | None:
    """Submits the points; with `wait=true` stays until they have ended.

    A signal while it waits takes those out of the queue that have not begun; the others save and stop.

    Args:
        received: grows as signals arrive.

    Returns:
        Exit codes of the points that ran; None when nobody waits for them.
    """
    folder = _next_folder(sweep)
    folder.mkdir(parents=True)
    started = submission.start_array({draft.point.number: draft.request for draft in drafts}, sweep.name, folder)
    waiting: list[tuple[Draft, Started]] = []
    for draft in drafts:
        point = started[draft.point.number]
        note(sweep, record, draft, PENDING if point else DONE)
        if point is None:
            view.finished_before(draft)
        else:
            view.submitted(draft, point)
            waiting.append((draft, point))
    return _follow(sweep, record, waiting, view, received) if drafts[0].request.config.wait else None


def _follow(sweep: SweepDir, record: SweepRecord, left: list[tuple[Draft, Started]], view: SweepView, received: Sequence[int]) -> list[int]:
    codes: list[int] = []
    attempts: dict[int, int] = {}
    passed_on = 0
    while left:
        for signum in received[passed_on:]:
            for _, started in left:
                started.handle.signal(signum)
            view.signalled(signum, len(left), first=passed_on == 0)
            passed_on += 1
        for draft, started in left[:]:
            run, status = started.attempt.run, started.handle.status()
            newest = run.last_attempt() or started.attempt
            if status == "ended":
                left.remove((draft, started))
                result, verdict = read_point(sweep, draft.point), newest.verdict()
                note(sweep, record, draft, result.state)
                codes.append(verdict.exit_code if verdict else ExitCode.FAILED)
                view.ended(draft, result)
            elif status == "running" and attempts.get(draft.point.number) != newest.number:
                attempts[draft.point.number] = newest.number
                note(sweep, record, draft, RUNNING)
                view.started(draft, Started(newest, started.handle))
            elif status == "pending" and draft.point.state != PENDING:
                note(sweep, record, draft, PENDING)
        view.update()
        time.sleep(_POLL_S if left else 0)
    return codes


def _next_folder(sweep: SweepDir) -> Path:
    before = [int(entry.name) for entry in sweep.submissions.iterdir() if entry.name.isdigit()] if sweep.submissions.is_dir() else []
    return sweep.submissions / f"{max(before, default=0) + 1:04d}"
