"""Jobs on this machine: one supervisor process that runs the stages and looks after the ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.errors import ConfigError, ExitCode, PreflightError, UnavailableError
from factory_train.gangs import island_run
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import END_SIGNAL
from factory_train.launchers.job import MAIN_GANG, STAGES, JobSpec, failed_first
from factory_train.run_dir import Attempt, RunDir, process_started_at

_POLL_S = 0.05


@dataclass
class LocalHandle:
    """A job on this machine.

    Args:
        job: content of job.json.
        process: the supervisor, where this very process submitted the job.
        lifeline: write end of the supervisor's stdin; never closed, so that it closes when this process ends.
    """

    job: dict[str, Any]
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    lifeline: int | None = field(default=None, repr=False)

    @property
    def attempt(self) -> Attempt:
        return Attempt(RunDir(Path(self.job["run_dir"])), self.job["attempt"])

    @property
    def exit_code(self) -> int | None:
        """What the supervisor exited with, known to the submitter alone; others read the verdict."""
        code = self.process.poll() if self.process else None
        # A supervisor that was killed has no exit code of its own to pass on.
        return ExitCode.FAILED if code is not None and code < 0 else code

    def to_json(self) -> dict[str, Any]:
        return self.job

    def status(self) -> str:
        if self.process is not None:
            return "running" if self.process.poll() is None else "ended"
        self._check_host()
        return "running" if process_started_at(self.job["pid"]) == self.job["pid_started"] else "ended"

    def waits_for(self) -> str | None:
        return None

    def logs(self) -> list[Path]:
        paths = [self.attempt.log_path("prepare"), *self._rank_logs(), *map(self.attempt.log_path, ("finish", "sync"))]
        paths.append(self.attempt.launch / "supervisor.log")
        return [path for path in failed_first(paths, self.attempt) if path.is_file()]

    def _rank_logs(self) -> Iterator[Path]:
        for gang in self.job["gangs"]:
            # Islands have attempts of their own.
            home = island_run(self.attempt.run, gang["name"]).last_attempt() if self.job.get("islands") else self.attempt
            for rank in range(gang["tasks_per_node"] if home else 0):
                assert home is not None
                yield home.log_path(f"rank-{rank:05d}")

    def signal(self, signum: int) -> None:
        """Sends a signal to the supervisor: SIGINT and SIGTERM mean save and stop, a second one means end at once.

        Raises:
            UnavailableError: the job runs on another machine, or belongs to another user.
        """
        if self.status() == "ended":
            return
        try:
            os.kill(self.job["pid"], signum)
        except ProcessLookupError:
            return
        except PermissionError:
            raise UnavailableError("the job belongs to another user", where=self.attempt.run.name) from None

    def cancel(self, *, now: bool = False) -> None:
        self.signal(END_SIGNAL if now else signal.SIGINT)

    def wait(self, timeout_s: float | None = None) -> bool:
        if self.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        else:
            limit = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
            while self.status() == "running" and time.monotonic() < limit:
                time.sleep(min(_POLL_S, max(0.0, limit - time.monotonic())))
        ended = self.status() == "ended"
        if ended and self.lifeline is not None:
            os.close(self.lifeline)
            self.lifeline = None
        return ended

    def _check_host(self) -> None:
        host, name = self.job["host"], self.attempt.run.name
        if host != socket.gethostname():
            raise UnavailableError(f"the job runs on host '{host}'", where=name, fix=f"run this command there: ssh {host}")


@dataclass(frozen=True)
class LocalLauncher:
    """Runs jobs as processes of this machine.

    Args:
        worker_module: module each process of a stage runs as `python -m MODULE STAGE`.
        tracker_module: module of the syncer, run as `python -m MODULE RUN_DIR --follow`.
        peer_grace_s: seconds the other ranks have after the first failure to end by themselves.
        tracker_grace_s: seconds the syncer has at the end to send the rest.
    """

    worker_module: str = "factory_train.worker"
    tracker_module: str = "factory_train.tracking.sync"
    peer_grace_s: float = 5.0
    tracker_grace_s: float = 60.0

    name = "local"

    def submit(self, job: JobSpec, *, detach: bool = False) -> LocalHandle:
        """Starts the job and returns at once.

        The job belongs to this process: when this process ends, the job saves and stops. With `detach` it lives on.

        Raises:
            ConfigError: the job asks for what one machine cannot give.
            PreflightError: the run directory cannot be written.
        """
        self._check(job)
        attempt = job.attempt
        command = [sys.executable, "-m", "factory_train.launchers.supervisor", str(attempt.run.path), str(attempt.number)]
        stdin, lifeline = (None, None) if detach else os.pipe()
        try:
            with open(attempt.launch / "supervisor.log", "ab") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL if stdin is None else stdin,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=import_environ(os.environ),
                    start_new_session=True,
                )
        except OSError as error:
            if lifeline is not None:
                os.close(lifeline)
            raise PreflightError(f"cannot start the job: {error.strerror}", where=str(attempt.launch)) from error
        finally:
            if stdin is not None:
                os.close(stdin)
        handle = LocalHandle(self._job_json(job, command, process.pid, detach), process, lifeline)
        try:
            storage.write_json(attempt.job_path, handle.job)
        except OSError as error:
            # Nothing has been started yet: the supervisor waits for this file.
            process.kill()
            handle.wait()
            raise PreflightError(f"cannot write: {error.strerror}", where=str(attempt.job_path)) from error
        return handle

    def attach(self, handle: dict[str, Any]) -> LocalHandle:
        return LocalHandle(handle)

    def describe(self, job: JobSpec) -> str:
        gang = job.gangs[0]
        lines = [f"local: on this machine ({socket.gethostname()}), below {job.attempt.path}"]
        for stage in job.stages:
            size = gang.world_size if stage == "train" else 1
            each = f" on each of {len(job.gangs)} islands" if stage == "train" and gang.name != MAIN_GANG else ""
            lines.append(f"  {stage:8} {size} process{'es' if size > 1 else ''}{each}: python -m {self.worker_module} {stage}")
        if job.tracker:
            lines.append(f"  beside   1 process: python -m {self.tracker_module} {job.attempt.run.path} --follow")
        return "\n".join(lines)

    def _check(self, job: JobSpec) -> None:
        if any(gang.nodes != 1 for gang in job.gangs):
            raise ConfigError("the local launcher runs on one machine", where="launcher.nodes", fix="launcher.nodes=1")
        if job.depends_on:
            raise ConfigError("the local launcher runs one job at a time, without dependencies", where="launcher.name")
        assert set(job.stages) <= set(STAGES), job.stages

    def _job_json(self, job: JobSpec, command: list[str], pid: int, detached: bool) -> dict[str, Any]:
        return {
            "format_version": 1,
            "launcher": self.name,
            "host": socket.gethostname(),
            "pid": pid,
            "pid_started": process_started_at(pid),
            "submitted": time.time(),
            "run_dir": str(job.attempt.run.path),
            "attempt": job.attempt.number,
            "command": command,
            "detached": detached,
            "gangs": [asdict(gang) for gang in job.gangs],
            "islands": job.gangs[0].name != MAIN_GANG,
            "stages": list(job.stages),
            "environ": dict(job.environ),
            "grace_s": job.grace_s,
            "tracker": job.tracker,
            "worker_module": self.worker_module,
            "tracker_module": self.tracker_module,
            "peer_grace_s": self.peer_grace_s,
            "tracker_grace_s": self.tracker_grace_s,
        }
