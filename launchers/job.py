"""The contract between whoever submits a job and whoever runs its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from factory_train.config import LauncherConfig
from factory_train.run_dir import Attempt, RunDir

# The stages of a job. `prepare` and `finish` are one process each, `train` is one process a rank.
STAGES = ("prepare", "train", "finish")

# The world of ranks of an ordinary job; other names are islands.
MAIN_GANG = "main"

_PREFIX = "FACTORY_TRAIN_"


@dataclass(frozen=True)
class WorkerEnv:
    """Everything a launcher tells a worker process, and nothing else; it travels as environment variables.

    Args:
        run_dir: absolute path of the run directory.
        attempt: number of the attempt this process belongs to.
        gang: name of the world of ranks ("main" for an ordinary job; one an island for DiLoCo).
        rank, local_rank, world_size, local_world_size: place of this process; 0, 0, 1, 1 outside the train stage.
        master_addr: host that rank 0 listens on.
        master_port: its port; 0 lets rank 0 take a free one and publish it in the run directory.
        deadline: seconds since the epoch at which the machine will be taken away, if known.
        lifeline: 1 when standard input is a pipe that the launcher holds open; its end means that the launcher died.
    """

    run_dir: str
    attempt: int
    gang: str = MAIN_GANG
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    deadline: float | None = None
    lifeline: int = 0

    def to_environ(self) -> dict[str, str]:
        """Returns the environment variables a launcher sets for the process."""
        return {_PREFIX + name.upper(): str(value) for name, value in asdict(self).items() if value is not None}

    @staticmethod
    def owns(name: str) -> bool:
        """Returns whether the environment variable `name` is one of those `to_environ` sets."""
        return name.removeprefix(_PREFIX).lower() in WorkerEnv.__dataclass_fields__ and name.startswith(_PREFIX)

    @staticmethod
    def from_environ(environ: Mapping[str, str] = os.environ) -> WorkerEnv:
        """Reads what `to_environ` wrote.

        Raises:
            KeyError: the process was not started by a launcher.
        """
        types = {"run_dir": str, "gang": str, "master_addr": str, "deadline": float}
        names = WorkerEnv.__dataclass_fields__
        found = {name: environ.get(_PREFIX + name.upper()) for name in names}
        if found["run_dir"] is None:
            raise KeyError(_PREFIX + "RUN_DIR")
        return WorkerEnv(**{name: types.get(name, int)(value) for name, value in found.items() if value is not None})

    def open_attempt(self) -> Attempt:
        return Attempt(RunDir.open(Path(self.run_dir)), self.attempt)


@dataclass(frozen=True)
class Gang:
    """One world of ranks."""

    name: str
    nodes: int
    tasks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


@dataclass(frozen=True)
class JobSpec:
    """What to run: the stages in order, for one attempt of one run.

    Args:
        attempt: whose directory holds the frozen configuration.
        gangs: one for an ordinary job, one an island for DiLoCo.
        stages: subset of `STAGES`, in order.
        environ: extra environment of every process.
        grace_s: seconds the ranks have to save after a stop signal.
        depends_on: handles of jobs that must end well first.
        tracker: whether the syncer runs beside the ranks (`factory_train.tracking.sync`).
        options: the launcher's section of the configuration.
        code: folder that holds the snapshot of the package; None runs the package where it is.
        folders: what the ranks read and write besides the run directory, for containers.
    """

    attempt: Attempt
    gangs: tuple[Gang, ...]
    stages: tuple[str, ...] = STAGES
    environ: Mapping[str, str] = field(default_factory=dict)
    grace_s: float = 120.0
    depends_on: tuple[str, ...] = ()
    tracker: bool = False
    options: LauncherConfig = field(default_factory=LauncherConfig)
    code: Path | None = None
    folders: tuple[Path, ...] = ()


class JobHandle(Protocol):
    """A submitted job; its JSON form in job.json is enough to attach to it again from another process."""

    def to_json(self) -> dict[str, Any]:
        """Returns what `Launcher.attach` needs."""
        ...

    def status(self) -> str:
        """Returns "running", "pending" or "ended", by the launcher's own knowledge."""
        ...

    def waits_for(self) -> str | None:
        """Returns why the job has not begun and what would help, None where it has or nobody can tell."""
        ...

    def logs(self) -> list[Path]:
        """Returns the log files, the most informative first."""
        ...

    def cancel(self, *, now: bool = False) -> None:
        """Asks the job to save and stop; `now` ends it without saving."""
        ...

    def signal(self, signum: int) -> None:
        """Passes on a signal: SIGINT and SIGTERM mean save and stop, a second one means end at once."""
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits for the job to end; returns whether it has."""
        ...

    @property
    def attempt(self) -> Attempt:
        """The attempt that was submitted; a job that was requeued has gone on to later ones."""
        ...

    @property
    def exit_code(self) -> int | None:
        """What it ended with, where this process can know it."""
        ...


class Launcher(Protocol):
    """Starts jobs somewhere."""

    name: str

    def submit(self, job: JobSpec, *, detach: bool = False) -> JobHandle:
        """Starts the job, writes job.json into its attempt, and returns at once.

        Args:
            detach: let a job on this machine live on when this process ends; a scheduler's always does.
        """
        ...

    def attach(self, handle: dict[str, Any]) -> JobHandle:
        """Returns the handle of a job submitted earlier, maybe by another process."""
        ...

    def describe(self, job: JobSpec) -> str:
        """Returns what `submit` would start, for --dry-run."""
        ...


def failed_first(paths: Iterable[Path], attempt: Attempt) -> list[Path]:
    """Returns logs in their order, but that of what failed in front."""
    error = attempt.error() or {}
    return sorted(paths, key=lambda path: os.path.relpath(path, attempt.run.path) != error.get("log"))
