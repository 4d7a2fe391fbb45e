"""Jobs of a Ray cluster: submitted over HTTP, carried out by processes of the cluster, watched through the run directory.

Not called `ray`: a folder with a module of that name must never be in the way of the package.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import factory_train
from factory_train import storage, switches
from factory_train.errors import ConfigError, ExitCode, PreflightError, UnavailableError
from factory_train.gangs import island_run
from factory_train.launchers import ray_api, ray_own
from factory_train.launchers.job import MAIN_GANG, STAGES, JobSpec, failed_first
from factory_train.launchers.ray_api import RayApi
from factory_train.launchers.ray_options import OWN, check, check_room, wanted
from factory_train.launchers.scheduler_handle import SchedulerHandle
from factory_train.run_dir import HEARTBEAT_STALE_S, Attempt

_FRESH_S = 1.0
# A dashboard that does not answer for a while has not lost its jobs.
_PATIENCE_S = 60.0
SPEC_NAME = "ray.json"
# Written by the job while it waits for room: {"state": "waiting" | "placed", "what": ..., "fix": ...}.
PLACEMENT_NAME = "placement.json"


@dataclass(frozen=True)
class RayJob:
    """What a cluster and the job itself say about it.

    Args:
        id: submission id.
        state: Ray's word (RUNNING), or WAITING while it waits for room.
        why: why it waits, and what to change where waiting does not help.
        nodes: where it runs.
    """

    id: str
    state: str
    why: str
    nodes: str

    @property
    def status(self) -> str:
        """Returns "pending", "running" or "ended", as `JobHandle.status` does."""
        return "ended" if self.state in ray_api.ENDED else "pending" if self.state in ("PENDING", "WAITING") else "running"


@dataclass
class RayHandle(SchedulerHandle):
    """A job in the hands of a Ray cluster."""

    _api: RayApi | None = field(default=None, repr=False)
    _seen: tuple[float, RayJob | None] | None = field(default=None, repr=False)

    def queued(self) -> RayJob | None:
        """Returns the job while it runs or waits; None when it has ended. Asks at most once a second.

        Raises:
            UnavailableError: the cluster does not answer, for a minute where it has answered before.
        """
        if self._seen is None or time.monotonic() - self._seen[0] > _FRESH_S:
            try:
                self._seen = time.monotonic(), self._look()
            except UnavailableError:
                if self._seen is None or time.monotonic() - self._seen[0] > _PATIENCE_S:
                    raise
        return self._seen[1]

    def _look(self) -> RayJob | None:
        known = self._connected().job(self.job["job_id"])
        newest = self.attempt.run.last_attempt() or self.attempt
        beat = newest.last_heartbeat()
        if known is None and newest.verdict() is None and beat is not None and time.time() - beat < HEARTBEAT_STALE_S:
            # A tunnel may lead to another cluster than it did; that one must not speak for the job.
            raise UnavailableError(
                "the Ray cluster that answers does not know the job, whose processes live",
                where=self.job["address"],
                fix="this address leads to another cluster than when the job was submitted",
            )
        if known is None or known["status"] in ray_api.ENDED:
            self._explain(newest, known)
            return None
        placement = storage.read_json(newest.launch / PLACEMENT_NAME) or {}
        waits = placement.get("state") == "waiting"
        why = placement.get("what", "") if waits else "the cluster is starting it"
        why += f": {placement['fix']}" if waits and placement.get("fix") else ""
        return RayJob(self.job["job_id"], "WAITING" if waits else known["status"], why, ", ".join(placement.get("nodes", ())))

    def _explain(self, newest: Attempt, known: dict[str, Any] | None) -> None:
        """Writes the verdict that nobody in the cluster could write: the job's own process died, or never began."""
        if newest.verdict() is not None or (storage.read_json(newest.job_path) or {}).get("job_id") != self.job["job_id"]:
            return
        if known is None:
            reason, code = f"the Ray cluster at {self.job['address']} does not know the job any more", None
        else:
            said = str(known.get("message") or "").strip().splitlines()
            reason, code = (
                "Ray ended the job: " + " ".join([known["status"], *said[:1], *said[1:][-1:]])[:600],
                known.get("driver_exit_code"),
            )
        by_user = code in (ExitCode.USAGE, ExitCode.PREFLIGHT, ExitCode.NOT_FOUND)
        with contextlib.suppress(OSError):
            newest.write_verdict("failed-user" if by_user else "failed-transient", code or ExitCode.FAILED, step=None, reason=reason)

    def _connected(self) -> RayApi:
        if self._api is None:
            self._api = RayApi.connect(self.job["address"], self.job["token_path"])
        return self._api

    def status(self) -> str:
        job = self.queued()
        return job.status if job else "ended"

    def waits_for(self) -> str | None:
        job = self.queued()
        return job.why if job and job.state == "WAITING" else None

    def logs(self) -> list[Path]:
        newest = self.attempt.run.last_attempt() or self.attempt
        islands = [island_run(newest.run, gang["name"]) for gang in self.job["gangs"] if gang["name"] != MAIN_GANG]
        homes = [home for island in islands if island.path.is_dir() and (home := island.last_attempt())]
        paths = [path for home in (newest, *homes) for folder in (home.path / "logs", home.launch) for path in sorted(folder.glob("*.log"))]
        return failed_first(paths, newest)

    def signal(self, signum: int) -> None:
        """Passes on a signal: after SIGTERM the run is preempted, after SIGINT interrupted; a second one ends it at once."""
        run = self.attempt.run
        if switches.is_on(run, switches.STOP) or switches.is_on(run, switches.PREEMPT):
            self.cancel(now=True)
        elif signum == signal.SIGTERM:
            switches.turn_on(run, switches.PREEMPT)
        else:
            self.cancel()

    def cancel(self, *, now: bool = False) -> None:
        """Asks the job to save and stop.

        Raises:
            UnavailableError: the cluster does not answer.
        """
        run = self.attempt.run
        switches.turn_on(run, switches.STOP)
        self._seen = None
        job = self.queued()
        if job is None or not (now or job.state == "PENDING"):
            # The job looks at the switch every second.
            return
        newest = run.last_attempt() or self.attempt
        outcome, reason = (
            ("interrupted", "taken back before it had started")
            if job.status == "pending"
            else ("killed", "ended at once on request; what followed the last checkpoint is lost")
        )
        newest.write_verdict(outcome, ExitCode.INTERRUPTED, step=None, reason=reason)
        self._connected().stop(self.job["job_id"])
        self._seen = None


@dataclass(frozen=True)
class RayLauncher:
    """Submits jobs to a Ray cluster.

    Args:
        worker_module: module each process of a stage runs as `python -m MODULE STAGE`.
        tracker_module: module of the syncer.
    """

    worker_module: str = "factory_train.worker"
    tracker_module: str = "factory_train.tracking.sync"

    name = "ray"

    def submit(self, job: JobSpec, *, detach: bool = False) -> RayHandle:
        """Gives the job to the cluster and returns at once; a cluster of our own is started first if there is none.

        Raises:
            ConfigError: a key that cannot be right.
            PreflightError: the cluster is too small, or runs another Ray.
            PolicyError: it wants a token that is not there.
            UnavailableError: it does not answer.
        """
        wanted_address, spec = check(job.options, islands=_has_islands(job)), self._spec(job)
        own = ray_own.ensure() if wanted_address == OWN else None
        address = own.address if own else wanted_address
        api = RayApi.connect(address, own.token_path if own else None)
        if job.options.python is None:
            api.check_version()
        if api.token is None:
            print(f"warning: {ray_api.OPEN_WARNING.format(address=address)}", file=sys.stderr)
        check_room(api, replace(wanted(job.gangs, job.options), gangs=spec["fewest"]), job.options)
        attempt = job.attempt
        submission_id = f"{attempt.run.name}-{attempt.number:04d}-{secrets.token_hex(3)}"
        handle = RayHandle(self._job_json(job, api, submission_id, own), api)
        try:
            storage.write_json(attempt.launch / SPEC_NAME, spec)
            # The job may start before this process does anything more.
            storage.write_json(attempt.job_path, handle.job)
        except OSError as error:
            raise PreflightError(f"cannot write: {error.strerror}", where=str(attempt.launch)) from error
        api.submit(submission_id, self._entrypoint(job, submission_id), self._environ(job), {"run_dir": str(attempt.run.path)})
        return handle

    def attach(self, handle: dict[str, Any]) -> RayHandle:
        return RayHandle(handle)

    def describe(self, job: JobSpec) -> str:
        address, need = check(job.options, islands=_has_islands(job)), wanted(job.gangs, job.options)
        where = "a cluster of our own on this machine" if address == OWN else address
        lines = [f"ray: POST {where}/api/jobs/" if "://" in where else f"ray: a job of {where}", "", f"  {self._entrypoint(job, 'ID')}", ""]
        lines += [f"  {name}={value}" for name, value in self._environ(job).items()]
        where = "the nodes of an island apart" if _has_islands(job) else "on nodes of its own"
        lines.append(f"  placed     {need}, each node's share whole, {where}")
        for stage in job.stages:
            size = job.gangs[0].world_size if stage == "train" else 1
            each = f" on each of {len(job.gangs)} islands" if stage == "train" and _has_islands(job) else ""
            lines.append(f"  {stage:<9}  {size} process{'es' if size > 1 else ''}{each}: python -m {self.worker_module} {stage}")
        return "\n".join(lines)

    def _code(self, job: JobSpec) -> Path:
        return job.code or Path(factory_train.__file__).absolute().parent.parent

    def _entrypoint(self, job: JobSpec, submission_id: str) -> str:
        """Returns the shell line that Ray runs on a node of the cluster."""
        run, code, python = job.attempt.run.path, self._code(job), job.options.python or sys.executable
        command = [python, "-m", "factory_train.launchers.ray_entry", str(run), str(job.attempt.number), submission_id]
        unseen = f"{run} is not there on $(hostname): runs_root must be a folder that all nodes share"
        no_python = f"no {python} on $(hostname): launcher.python=PYTHON OF THE NODES"
        return "; ".join(
            [
                f'test -d {shlex.quote(str(run))} || {{ echo "{unseen}" >&2; exit {int(ExitCode.PREFLIGHT)}; }}',
                f'command -v {shlex.quote(python)} >/dev/null || {{ echo "{no_python}" >&2; exit {int(ExitCode.PREFLIGHT)}; }}',
                f"cd {shlex.quote(str(code))} && exec {shlex.join(command)}",
            ]
        )

    def _environ(self, job: JobSpec) -> dict[str, str]:
        path = [str(self._code(job)), *(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)]
        # Ray's workers are started with it too, so that every process of the job imports the snapshot.
        return {
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _spec(self, job: JobSpec) -> dict[str, Any]:
        """Returns what the job needs to know, and later attempts of it."""
        if job.depends_on:
            raise ConfigError("jobs of a Ray cluster wait for no other", where="launcher.name")
        assert set(job.stages) <= set(STAGES), job.stages
        gang, options, several = job.gangs[0], job.options, _has_islands(job)
        # A run that has begun goes on with as few islands as may train; the others come when there is room.
        fewest = min(job.attempt.config().diloco.quorum, len(job.gangs)) if several and job.attempt.number > 1 else len(job.gangs)
        return {
            "format_version": 1,
            "gang": asdict(gang),
            "islands": [asdict(island) for island in job.gangs] if several else [],
            "fewest": fewest,
            "meets_others": False,
            "wanted": asdict(wanted(job.gangs, options)),
            "min_nodes": options.elastic.min_nodes or gang.nodes,
            "elastic_wait_s": options.elastic.wait_s,
            "stages": list(job.stages),
            "environ": dict(job.environ),
            "grace_s": job.grace_s,
            "hang_s": options.hang_s,
            "stall_s": options.stall_s,
            "requeue": options.requeue,
            "tracker": job.tracker,
            "fabric": options.fabric,
            "interface": options.interface,
            "python": options.python or sys.executable,
            "worker_module": self.worker_module,
            "tracker_module": self.tracker_module,
        }

    def _job_json(self, job: JobSpec, api: RayApi, submission_id: str, own: ray_own.OwnCluster | None) -> dict[str, Any]:
        return {
            "format_version": 1,
            "launcher": self.name,
            # Whose loopback address it is.
            "host": socket.gethostname(),
            "address": api.address,
            "token_path": own.token_path if own else os.environ.get("RAY_AUTH_TOKEN_PATH"),
            "job_id": submission_id,
            "job_ids": [submission_id],
            "submitted": time.time(),
            "run_dir": str(job.attempt.run.path),
            "attempt": job.attempt.number,
            "gangs": [asdict(gang) for gang in job.gangs],
            "stages": list(job.stages),
        }


def _has_islands(job: JobSpec) -> bool:
    return job.gangs[0].name != MAIN_GANG
