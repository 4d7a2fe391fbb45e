"""The run directory: names, attempts, events, verdicts, and what a reader may conclude from them.

Every file has one writer, so nothing races on a shared filesystem. Everything about a run can be read from here
with no server up.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.config import Config, dump_config, load_config
from factory_train.errors import ConfigError, FencedError, NotFoundError

RUN_SCHEMA_VERSION = 1
# A heartbeat older than this means that the rank is gone, as seen from another machine.
HEARTBEAT_STALE_S = 60.0
HEARTBEAT_EVERY_S = 5.0

# How an attempt can end. `done` also covers everything after training (evaluation, export).
VERDICTS = ("done", "preempted", "interrupted", "failed-user", "failed-transient", "killed")


@dataclass(frozen=True)
class Verdict:
    """How one attempt ended.

    Args:
        outcome: one of `VERDICTS`.
        exit_code: what the command that ran it exits with.
        step: last optimizer step that was completed, if training began.
        reason: one line for a person.
        time: seconds since the epoch.
    """

    outcome: str
    exit_code: int
    step: int | None
    reason: str
    time: float


@dataclass(frozen=True)
class Attempt:
    """One start of a run. Its number is the fencing token: only the newest attempt may commit anything."""

    run: RunDir
    number: int

    @property
    def path(self) -> Path:
        return self.run.path / "attempts" / f"{self.number:04d}"

    @property
    def config_path(self) -> Path:
        return self.path / "config.yaml"

    @property
    def launch(self) -> Path:
        """Files of the launcher: the only ones it writes besides job.json."""
        return self.path / "launch"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def job_path(self) -> Path:
        return self.path / "job.json"

    @property
    def error_path(self) -> Path:
        return self.path / "ERROR.json"

    @property
    def verdict_path(self) -> Path:
        return self.path / "verdict.json"

    def log_path(self, name: str) -> Path:
        """`rank-00000` for ranks, `prepare` and `finish` for the stages around them, `sync` for the syncer."""
        return self.path / "logs" / f"{name}.log"

    def heartbeat_path(self, rank: int) -> Path:
        return self.path / "heartbeat" / f"rank-{rank:05d}"

    def config(self) -> Config:
        return load_config(self.config_path)

    def is_newest(self) -> bool:
        return self.run.attempt_numbers()[-1:] == [self.number]

    def check_fence(self, doing: str) -> None:
        """Raises FencedError when a newer attempt exists; call right before anything is committed."""
        newest = self.run.attempt_numbers()[-1]
        if newest != self.number:
            raise FencedError(f"attempt {self.number} was superseded by attempt {newest}; not {doing}", where=str(self.run.path))

    def record_event(self, kind: str, **facts: Any) -> None:
        """Appends to this attempt's events.jsonl; called by one process at a time (rank 0, or the stage around it)."""
        storage.append_json_line(self.events_path, {"time": time.time(), "event": kind, **facts})

    def record_launch_event(self, kind: str, **facts: Any) -> None:
        """Appends to launch/events.jsonl, which only the launcher writes."""
        storage.append_json_line(self.launch / "events.jsonl", {"time": time.time(), "event": kind, **facts})

    def events(self) -> list[dict[str, Any]]:
        """Returns the events of both writers, oldest first."""
        rows = storage.read_json_lines(self.events_path) + storage.read_json_lines(self.launch / "events.jsonl")
        return sorted(rows, key=lambda row: row["time"])

    def record_error(self, error: dict[str, Any]) -> bool:
        """Keeps the first failure of the attempt: rank, host, message, traceback, hint. Later ones are victims."""
        return storage.write_json_once(self.error_path, error)

    def error(self) -> dict[str, Any] | None:
        return storage.read_json(self.error_path)

    def write_verdict(self, outcome: str, exit_code: int, *, step: int | None, reason: str) -> bool:
        """Records how the attempt ended; the first writer wins. A superseded attempt may not speak for the run."""
        assert outcome in VERDICTS, outcome
        self.check_fence("writing a verdict")
        return storage.write_json_once(self.verdict_path, asdict(Verdict(outcome, int(exit_code), step, reason, time.time())))

    def verdict(self) -> Verdict | None:
        value = storage.read_json(self.verdict_path)
        return Verdict(**value) if value else None

    def last_heartbeat(self) -> float | None:
        """Returns when any rank was last known to live, in seconds since the epoch."""
        folder = self.path / "heartbeat"
        times = [entry.stat().st_mtime for entry in folder.iterdir()] if folder.is_dir() else []
        return max(times, default=None)


@dataclass(frozen=True)
class RunDir:
    """One run: `runs/<recipe>-<id>/`."""

    path: Path

    @staticmethod
    def create(root: Path, recipe: str, run_id: str | None, parent: str | None = None) -> RunDir:
        """Makes a new, empty run directory below `root`.

        Args:
            parent: the run, and the checkpoint of it, whose weights this one starts from.

        Raises:
            ConfigError: the id is not usable as part of a folder name, or the run is there already.
        """
        name = run_id or "".join(secrets.choice("abcdefghjkmnpqrstuvwxyz23456789") for _ in range(6))
        if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith((".", "-")):
            raise ConfigError(f"run={name!r} cannot name a folder", fix="use letters, digits, '-', '_' and '.'")
        run = RunDir((root / f"{recipe}-{name}").absolute())
        try:
            run.path.mkdir(parents=True)
        except FileExistsError:
            raise ConfigError(f"run '{run.name}' exists already", where=str(run.path)) from None
        try:
            (run.path / "attempts").mkdir()
            run._write_info(recipe, name, time.time(), parent, 0, None)
        except OSError:
            # A full disk must not leave half a run behind.
            shutil.rmtree(run.path, ignore_errors=True)
            raise
        return run

    @staticmethod
    def open(path: Path) -> RunDir:
        """Opens an existing run directory.

        Raises:
            NotFoundError: there is no run.json in `path`.
        """
        run = RunDir(path.absolute())
        if not (run.path / "run.json").is_file():
            raise NotFoundError("not a run directory (no run.json in it)", where=str(path))
        return run

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def id(self) -> str:
        return self.info()["id"]

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def data(self) -> Path:
        """The run's own copy of what evaluation needs: tokenizer, manifest, validation tokens."""
        return self.path / "data"

    @property
    def report_path(self) -> Path:
        return self.path / "report.md"

    @property
    def lock_path(self) -> Path:
        """Held while an attempt is being taken, so that two commands cannot both believe they are first."""
        return self.path / ".submit.lock"

    def _write_info(self, recipe: str, run_id: str, created: float, parent: str | None, attempt: int, sweep: dict[str, Any] | None) -> None:
        info = {
            "schema_version": RUN_SCHEMA_VERSION,
            "id": run_id,
            "recipe": recipe,
            "created": created,
            "user": getpass.getuser(),
            "parent_run": parent,
            "current_attempt": attempt,
        }
        if sweep is not None:
            info["sweep"] = sweep
        storage.write_json(self.path / "run.json", info)

    def info(self) -> dict[str, Any]:
        """Returns run.json.

        Raises:
            ConfigError: it was written by a newer version of factory_train.
        """
        info = storage.read_json(self.path / "run.json")
        if info["schema_version"] > RUN_SCHEMA_VERSION:
            raise ConfigError(
                f"run schema {info['schema_version']} is newer than this version reads", where=self.name, fix="upgrade factory_train"
            )
        return info

    def new_attempt(self, config: Config) -> Attempt:
        """Takes the next attempt number (exclusive create) and freezes `config` in it."""
        while True:
            attempt = Attempt(self, (self.attempt_numbers() or [0])[-1] + 1)
            try:
                attempt.path.mkdir()
                break
            except FileExistsError:
                continue
        for folder in ("launch", "logs", "heartbeat"):
            (attempt.path / folder).mkdir()
        storage.write_atomic(attempt.config_path, dump_config(config))
        info = self.info()
        sweep = info.get("sweep") or _place_in_sweep(config)
        self._write_info(info["recipe"], info["id"], info["created"], info.get("parent_run"), attempt.number, sweep)
        return attempt

    def attempt_numbers(self) -> list[int]:
        """Returns the numbers of all attempts in order; the folders are the truth, run.json only repeats the last."""
        return sorted(int(name) for name in os.listdir(self.path / "attempts") if name.isdigit())

    def attempts(self) -> list[Attempt]:
        return [Attempt(self, number) for number in self.attempt_numbers()]

    def last_attempt(self) -> Attempt | None:
        numbers = self.attempt_numbers()
        return Attempt(self, numbers[-1]) if numbers else None

    def is_alive(self) -> bool:
        """Returns whether the newest attempt is still running, as far as its files tell."""
        attempt = self.last_attempt()
        if attempt is None or attempt.verdict() is not None:
            return False
        job = storage.read_json(attempt.job_path)
        if job is None:
            return False
        if job.get("host") == socket.gethostname() and job.get("pid"):
            return process_started_at(job["pid"]) == job.get("pid_started")
        beat = attempt.last_heartbeat()
        return beat is not None and time.time() - beat < HEARTBEAT_STALE_S

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the metric rows of all attempts, merged: what a later attempt repeated replaces the earlier rows.

        Each metrics.jsonl begins with a row of kind "start" whose `step` is where that attempt resumed; rows of
        earlier attempts beyond that step belong to work that was lost.
        """
        merged: list[dict[str, Any]] = []
        for attempt in self.attempts():
            for row in storage.read_json_lines(attempt.metrics_path):
                if row["kind"] == "start":
                    merged = [old for old in merged if old["step"] <= row["step"]]
                else:
                    merged.append(row)
        return merged


def _place_in_sweep(config: Config) -> dict[str, Any] | None:
    """Returns which point of which sweep a run is: a sweep names its runs `<sweep>-<number>`."""
    sweep, _, number = (config.run or "").rpartition("-")
    return {"id": sweep, "point": int(number)} if config.sweep == sweep and number.isdigit() else None


def process_started_at(pid: int) -> float | None:
    """Returns when process `pid` of this machine started, or None if there is none.

    With it a recorded pid that now belongs to somebody else is not mistaken for ours. On Linux it is counted in clock
    ticks since boot: the time of day psutil derives from it jumps whenever the machine's clock is set.
    """
    if os.path.exists("/proc/self/stat"):
        try:
            text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The name, in parentheses, may itself hold blanks and parentheses; state is field 3, start time field 22.
        state, *rest = text.rpartition(")")[2].split()
        return None if state in ("Z", "X") else float(rest[18])
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
