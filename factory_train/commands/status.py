"""`status [RUN]`: what runs are doing, read from their directories alone."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Any

from factory_train import storage, tail
from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, split_words
from factory_train.console import DATA_WAIT_STEPS, DataWait, failure_lines
from factory_train.distributed.board import LEFT, FolderBoard
from factory_train.errors import ConfigError, FactoryTrainError
from factory_train.gangs import exchange_folder, has_islands, islands_of
from factory_train.launchers.by_name import is_alive, scheduled
from factory_train.launchers.ray_jobs import PLACEMENT_NAME, RayJob
from factory_train.launchers.slurm import SlurmHandle
from factory_train.launchers.slurm_queue import QueuedJob
from factory_train.run_dir import HEARTBEAT_STALE_S, Attempt, RunDir
from factory_train.runs_index import all_runs, find_run, runs_root
from factory_train.units import format_count, format_duration

WATCH_EVERY_S = 2.0
_KINDS = ("train", "validation")
# About ten thousand steps; a validation further back than that is not news.
_TAIL_BYTES = 4 << 20


@dataclass(frozen=True)
class RunStatus:
    """What one run directory says.

    Args:
        state: created, pending (in a scheduler's queue), preparing, running, finishing, done, preempted, interrupted, failed,
            killed, lost (it ended without a verdict), or unreadable.
        steps: length of the run.
        job: the scheduler's job, its state, and where it runs.
        data_wait: part of the step time that waiting for data takes, where it is worth a mention.
        heartbeat_age_s: seconds since any of its processes was last known to live.
        failure: the first failure, a line each for what, who, fix and log.
        islands: which there are, where each is, and what last changed among them.
    """

    name: str
    recipe: str
    path: str
    state: str
    attempt: int
    step: int
    steps: int
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_s: float | None = None
    data_wait: float | None = None
    checkpoint: str | None = None
    checkpoint_age_s: float | None = None
    heartbeat_age_s: float | None = None
    reason: str | None = None
    failure: tuple[str, ...] = ()
    job: str | None = None
    islands: str | None = None


def run_status(run: RunDir) -> RunStatus:
    """Returns the status of a run, wherever its directory is."""
    info, attempt = run.info(), run.last_attempt()
    if attempt is None:
        return RunStatus(run.name, info["recipe"], str(run.path), "created", 0, 0, 0)
    newest = _newest_rows(run)
    train, validation = newest.get("train"), newest.get("validation")
    job, job_text = _job(run)
    state = _state(run, attempt, job)
    checkpoints, beat, verdict = list_checkpoints(run), attempt.last_heartbeat(), attempt.verdict()
    failed = state in ("failed", "killed", "lost")
    reason = job.why if job and state == "pending" else verdict.reason if verdict else None
    return RunStatus(
        name=run.name,
        recipe=info["recipe"],
        path=str(run.path),
        state=state,
        attempt=attempt.number,
        step=train["step"] if train else 0,
        steps=attempt.config().train.steps,
        loss=train["loss"] if train else None,
        validation_loss=validation["loss"] if validation else None,
        tokens_per_s=train["tokens_per_s"] if train else None,
        data_wait=_data_wait(attempt),
        checkpoint=checkpoints[0].path.name if checkpoints else None,
        checkpoint_age_s=time.time() - checkpoints[0].path.stat().st_mtime if checkpoints else None,
        heartbeat_age_s=time.time() - beat if beat else None,
        reason=reason,
        failure=tuple(failure_lines(attempt)) if failed else (),
        job=job_text,
        islands=_islands(run),
    )


def _status_or_why_not(run: RunDir) -> RunStatus:
    """Like `run_status`, but one run that cannot be read does not hide the others of a table."""
    try:
        return run_status(run)
    except (FactoryTrainError, OSError, ValueError, KeyError, TypeError) as error:
        what = f"cannot be read: {error}".splitlines()[0]
        return RunStatus(run.name, "?", str(run.path), "unreadable", 0, 0, 0, reason=what, failure=(what,))


def _newest_rows(run: RunDir) -> dict[str, dict[str, Any]]:
    """Returns the newest metric row of each kind shown, read from the ends of the files: they grow for weeks.

    Rows of earlier attempts count as far as the later ones did not go back behind them, as in `RunDir.metrics`.
    """
    newest: dict[str, dict[str, Any]] = {}
    resumed_at = math.inf
    for attempt in reversed(run.attempts()):
        for line in tail.lines_backwards(attempt.metrics_path, _TAIL_BYTES):
            # Most lines are of no interest, so they are not worth being parsed.
            wanted = [kind for kind in _KINDS if kind not in newest and f'"kind": "{kind}"'.encode() in line]
            if wanted and (row := json.loads(line))["step"] <= resumed_at:
                newest[wanted[0]] = row
            if len(newest) == len(_KINDS):
                return newest
        if start := tail.first_row(attempt.metrics_path):
            resumed_at = min(resumed_at, start["step"])
    return newest


def _islands(run: RunDir) -> str | None:
    if not has_islands(run):
        return None
    board = FolderBoard(exchange_folder(run))
    epoch, texts = board.epoch(), []
    waiting = {island.name: why for island in islands_of(run) if (why := _waits_for(island)) is not None}
    beats = board.beats()
    for name in sorted(waiting.keys() | beats.keys()):
        if name in waiting:
            texts.append(f"{name} waits ({waiting[name]})")
        else:
            beat = beats[name]
            is_member = epoch is not None and epoch.has(name, beat.incarnation) and beat.state != LEFT
            texts.append(f"{name} at step {beat.step}" if is_member else f"{name} {beat.state} at step {beat.step}")
    return ", ".join(texts) + (f"; epoch {epoch.number}: {epoch.why}" if epoch else "")


def _waits_for(island: RunDir) -> str | None:
    """Returns what an island lacks that has no place in a Ray cluster; None where it has one, or needs none."""
    attempt = island.last_attempt()
    if attempt is None or attempt.verdict() is not None:
        return None
    found = storage.read_json(attempt.launch / PLACEMENT_NAME)
    return found["what"] if found and found["state"] == "waiting" else None


def _data_wait(attempt: Attempt) -> float | None:
    newest = (row for row in tail.rows_backwards(attempt.metrics_path, _TAIL_BYTES) if row["kind"] == "train")
    wait = DataWait()
    for row in itertools.islice(newest, DATA_WAIT_STEPS):
        wait.add(row)
    return wait.significant()


def _job(run: RunDir) -> tuple[QueuedJob | RayJob | None, str | None]:
    """Returns the run's place in its scheduler's queue, and a line about it for people."""
    handle = scheduled(run)
    if handle is None:
        return None, None
    kind = handle.job["launcher"]
    try:
        job = handle.queued()
        parts = [part.queued() for part in handle.parts] if isinstance(handle, SlurmHandle) else [job]
    except FactoryTrainError as error:
        return None, f"{kind} {handle.job_ids[0]}: {error.what}"
    if job is None:
        return None, f"{kind} {handle.job_ids[0]}: has ended"
    return job, f"{kind} " + ", ".join(f"{part.id}: {part.state}" + (f" on {part.nodes}" if part.nodes else "") for part in parts if part)


def _state(run: RunDir, attempt: Attempt, job: QueuedJob | RayJob | None) -> str:
    if job is not None and job.status == "pending":
        # Whatever the last attempt came to: the next one is on its way.
        return "pending"
    verdict = attempt.verdict()
    if verdict is not None:
        return verdict.outcome.partition("-")[0]
    beat = attempt.last_heartbeat()
    just_beat = beat is not None and time.time() - beat < HEARTBEAT_STALE_S
    if not is_alive(run) and not (just_beat and storage.read_json(attempt.job_path) is None):
        return "lost"
    kinds = [event["event"] for event in attempt.events()]
    if "finish" in kinds:
        return "finishing"
    return "running" if attempt.metrics_path.exists() else "preparing"


def main(argv: list[str]) -> int:
    """Shows one run, or all of the runs root; returns 0.

    Raises:
        NotFoundError: there is no such run.
    """
    parser = ArgumentParser("status", "Shows what runs are doing; reads their directories and nothing else.")
    add_words(parser)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--watch", action="store_true", help="again and again, until Ctrl-C")
    arguments = parser.parse(argv)
    name, settings = split_words("status", arguments.words, ())
    root = runs_root(settings.get("runs_root"))
    if arguments.json and arguments.watch:
        raise ConfigError("--json shows one moment", where="status", fix="leave out --watch")
    try:
        while True:
            found = [run_status(find_run(name, root))] if name else [_status_or_why_not(run) for run in all_runs(root)]
            if arguments.json:
                print(json.dumps([dataclasses.asdict(status) for status in found], indent=2))
            else:
                if arguments.watch and sys.stdout.isatty():
                    print("\x1b[2J\x1b[H", end="")
                print("\n".join(_details(found[0]) if name else _table(found) if found else [f"no runs in {root}"]), flush=True)
            if not arguments.watch:
                return 0
            time.sleep(WATCH_EVERY_S)
    except KeyboardInterrupt:
        return 0


def _table(found: list[RunStatus]) -> list[str]:
    header = ("RUN", "STATE", "JOB", "TRY", "STEP", "LOSS", "VAL", "TOK/S", "CHECKPOINT", "AGE")
    rows = [header, *(_row(status) for status in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    # A failure is worth a line of its own: the first rank that failed, not the last.
    for index, status in reversed(list(enumerate(found, start=1))):
        if status.failure:
            lines.insert(index + 1, f"  {status.failure[0]}")
        elif status.state == "pending" and status.reason:
            lines.insert(index + 1, f"  waits: {status.reason}")
    return lines


def _row(status: RunStatus) -> tuple[str, ...]:
    return (
        status.name,
        status.state.upper(),
        status.job.split()[1].rstrip(":") if status.job else "-",
        str(status.attempt),
        f"{status.step}/{status.steps}",
        _figure(status.loss),
        _figure(status.validation_loss),
        format_count(status.tokens_per_s) if status.tokens_per_s else "-",
        status.checkpoint or "-",
        f"{format_duration(status.checkpoint_age_s)} ago" if status.checkpoint_age_s is not None else "-",
    )


def _details(status: RunStatus) -> list[str]:
    waits = f", data wait {status.data_wait:.0%}" if status.data_wait else ""
    facts: list[tuple[str, Any]] = [
        ("run", status.name),
        ("folder", status.path),
        ("state", f"{status.state}, attempt {status.attempt}" + (f": {status.reason}" if status.reason else "")),
        ("job", status.job),
        ("step", f"{status.step} of {status.steps}"),
        ("islands", status.islands),
        ("loss", f"{_figure(status.loss)} training, {_figure(status.validation_loss)} validation"),
        ("speed", f"{format_count(status.tokens_per_s)} tokens/s{waits}" if status.tokens_per_s else None),
        ("checkpoint", f"{status.checkpoint}, {format_duration(status.checkpoint_age_s or 0)} ago" if status.checkpoint else "none yet"),
        ("alive", f"{format_duration(status.heartbeat_age_s)} ago" if status.heartbeat_age_s is not None else None),
        ("next", _next(status)),
    ]
    return [f"{name:<10}  {value}" for name, value in facts if value is not None] + list(status.failure)


def _next(status: RunStatus) -> str:
    name = shlex.quote(status.name)
    if status.state in ("pending", "preparing", "running", "finishing"):
        return f"python -m factory_train logs -f {name}"
    return f"python -m factory_train {'evaluate' if status.state == 'done' else 'resume'} {name}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
