"""The record of a sweep: its folder beside the runs, its points, and how each of them stands.

`runs/sweep-<recipe>-<id>/` holds sweep.json, which the command that runs the sweep writes, and what compares the points
in the end. A point is an ordinary run beside it, named `<recipe>-<id>-<number>`.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ConfigError, PreflightError
from factory_train.run_dir import RunDir, process_started_at

SWEEP_FORMAT_VERSION = 1
NOT_RUN, PENDING, RUNNING, DONE, FAILED = "not run", "pending", "running", "done", "failed"
_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"


@dataclass
class SweepPoint:
    """One combination of values.

    Args:
        number: from 1, in the order of the command.
        values: what it has where points differ: key or group, and value.
        run: name of its run directory.
        state: "not run", "pending" (in a scheduler's queue), "running", or how its run ended when the sweep last looked.
        reason: why it ended so, where that is not in its run directory.
    """

    number: int
    values: dict[str, Any]
    run: str
    state: str = NOT_RUN
    reason: str = ""

    @property
    def label(self) -> str:
        """What tells this point from the others, as it is written on the command line."""
        return " ".join(f"{name}={shown_value(value)}" for name, value in self.values.items())


@dataclass
class SweepRecord:
    """Content of sweep.json.

    Args:
        axes: keys and groups in which points differ, in the order of the command.
        argv: words of the command that ran it last.
        owner: host, pid and start of the process that ran it last.
        ended: when that process had nothing left to run; None before.
    """

    id: str
    recipe: str
    created: float
    user: str
    axes: list[str]
    points: list[SweepPoint] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    owner: dict[str, Any] = field(default_factory=dict)
    ended: float | None = None
    format_version: int = SWEEP_FORMAT_VERSION

    def run_id(self, number: int) -> str:
        """Returns the id of the run of a point."""
        return f"{self.id}-{number:02d}"

    def numeric_axes(self) -> list[str]:
        """Returns the axes whose values are all numbers, and more than one."""
        found = {axis: {value_key(point.values.get(axis)) for point in self.points} for axis in self.axes}
        return [axis for axis in self.axes if len(found[axis]) > 1 and all(_is_number(point.values.get(axis)) for point in self.points)]


def shown_value(value: Any) -> str:
    """Returns a value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{shown_value(item)}" for name, item in value.items()) + "}"
    return f"[{','.join(map(shown_value, value))}]" if isinstance(value, list) else str(value)


def value_key(value: Any) -> Any:
    """Returns a value as something that can be compared and hashed."""
    if isinstance(value, dict):
        return tuple((name, value_key(inner)) for name, inner in sorted(value.items()))
    return tuple(map(value_key, value)) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class SweepDir:
    """One sweep: `runs/sweep-<recipe>-<id>/`."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def record_path(self) -> Path:
        return self.path / "sweep.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.md"

    @property
    def table_path(self) -> Path:
        return self.path / "table.csv"

    @property
    def submissions(self) -> Path:
        """Script, logs and shared code of each time a scheduler was given points, in numbered folders."""
        return self.path / "submissions"

    @property
    def plots(self) -> Path:
        return self.path / "report"

    def record(self) -> SweepRecord:
        """Returns sweep.json.

        Raises:
            ConfigError: it was written by a newer version of factory_train.
        """
        value = storage.read_json(self.record_path)
        if value["format_version"] > SWEEP_FORMAT_VERSION:
            raise ConfigError(
                f"sweep.json has format {value['format_version']}, newer than this version reads",
                where=self.name,
                fix="upgrade factory_train",
            )
        known = {item.name for item in fields(SweepRecord)}
        points = [SweepPoint(**point) for point in value["points"]]
        return SweepRecord(**({name: item for name, item in value.items() if name in known} | {"points": points}))

    def save(self, record: SweepRecord) -> None:
        """Replaces sweep.json; only the process inside `held` does."""
        storage.write_json(self.record_path, asdict(record))

    def run(self, point: SweepPoint) -> RunDir | None:
        """Returns the run of a point; None when it was never started."""
        run = RunDir(self.path.parent / point.run)
        return run if (run.path / "run.json").is_file() and run.last_attempt() is not None else None

    def is_running(self, record: SweepRecord) -> bool:
        """Returns whether the command that runs the sweep is still there, or one of its points is, as far as files tell."""
        if record.ended is not None:
            return False
        owner = record.owner
        if owner.get("host") == socket.gethostname():
            return process_started_at(owner["pid"]) == owner["pid_started"]
        return any(run.is_alive() for point in record.points if (run := self.run(point)))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keeps every other command from running this sweep meanwhile.

        Raises:
            PreflightError: another command runs it.
        """
        with open(self.path / ".sweep.lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PreflightError(
                    f"sweep '{self.name}' is already running", where=str(self.path), fix="wait for it, or take another sweep=NAME"
                ) from None
            yield


def new_record(recipe: str, name: str | None, axes: Sequence[str]) -> SweepRecord:
    """Returns the record of a sweep that has not begun."""
    return SweepRecord(
        id=name or "".join(secrets.choice(_ALPHABET) for _ in range(6)),
        recipe=recipe,
        created=time.time(),
        user=getpass.getuser(),
        axes=list(axes),
    )


def this_process() -> dict[str, Any]:
    """Returns who runs a sweep from now on."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": process_started_at(os.getpid())}


def sweep_folder(root: Path, record: SweepRecord) -> SweepDir:
    """Returns where a sweep is kept."""
    return SweepDir((root / f"sweep-{record.recipe}-{record.id}").absolute())


def all_sweeps(root: Path) -> list[SweepDir]:
    """Returns the sweeps in a folder of runs, by name."""
    return [SweepDir(path.parent.absolute()) for path in sorted(root.glob("sweep-*/sweep.json"))]


def find_sweep(root: Path, text: str) -> SweepDir | None:
    """Returns the sweep whose id or folder is `text`, if there is one.

    Raises:
        ConfigError: sweeps of several recipes have that id.
    """
    found = [sweep for sweep in all_sweeps(root) if sweep.name == text or sweep.record().id == text]
    if len(found) > 1:
        raise ConfigError(
            f"several sweeps are named '{text}': {', '.join(sweep.name for sweep in found)}", where=str(root), fix="take another sweep=NAME"
        )
    return found[0] if found else None


def sweep_of(run: RunDir) -> SweepDir | None:
    """Returns the sweep that a run is a point of, if its folder is beside the run."""
    belongs = run.info().get("sweep")
    return find_sweep(run.path.parent, belongs["id"]) if belongs else None
