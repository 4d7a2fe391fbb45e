"""A real Slurm on this machine (`slurm/local_cluster.sh`), and runs on it as a person starts and watches them."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command
import pytest
from conftest import REPOSITORY

from factory_train.run_dir import RunDir

PACKAGES = "munge slurmctld slurmd slurm-client"
ACCOUNTING = "slurmdbd mariadb-server"
_SCRIPT = REPOSITORY / "slurm" / "local_cluster.sh"
# Four ranks on two nodes, so small that a step takes a hundredth of a second.
GANG = ("recipe=llama_fsdp", "launcher=slurm", "launcher.nodes=2", "launcher.tasks_per_node=2", "launcher.fabric=loopback")
QUICK = (*command.SMALL, "train.deterministic=true", "train.num_threads=1", "train.validate_every=0", "checkpoint.every_steps=20")


class Cluster:
    """Starts a cluster and ends it.

    Args:
        folder: for its state.
        limits: with accounting and limits that are enforced.
        user_signal: whether ranks of a job that is preempted get its --signal first; else SIGTERM is all they get.
    """

    def __init__(self, folder: Path, *, limits: bool = False, user_signal: bool = True) -> None:
        needed = ["munged", "slurmctld", "slurmd", "sbatch", *(["slurmdbd", "mariadbd"] if limits else [])]
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        missing = [name for name in needed if shutil.which(name, path=path) is None]
        if missing:
            packages = PACKAGES + (f" {ACCOUNTING}" if limits else "")
            pytest.skip(f"no {', '.join(missing)} here: apt-get install --no-install-recommends {packages}")
        on = "1" if limits else "0"
        # Sockets have short names; two test sessions must not share ports.
        self._folder = Path("/tmp") / f"slurm-{os.getpid()}-{on}-{user_signal:d}"
        port = str(next(base for base in random.sample(range(17000, 31000, 1000), 14) if _is_free(base + 900) and _is_free(base + 1)))
        self._environ = os.environ | {"LS_DIR": str(self._folder), "LS_ACCT": on, "LS_LIMITS": on, "LS_ETC": "0", "LS_PORT": port}
        self._environ["LS_USERSIG"] = f"{user_signal:d}"
        self.conf = self._folder / "etc" / "slurm.conf"
        self.state = folder

    def __enter__(self) -> Cluster:
        try:
            self.script("start")
        except BaseException:
            self.script("clean")
            raise
        self._before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.conf)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop("SLURM_CONF", None)
        if self._before is not None:
            os.environ["SLURM_CONF"] = self._before
        self.script("clean")

    def script(self, *words: str) -> str:
        done = subprocess.run([str(_SCRIPT), *words], env=self._environ, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def slurm(self, *words: str) -> str:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def submit(folder: Path, name: str, *words: str) -> RunDir:
    """Submits a run with this name and returns its directory; the command returns at once."""
    done = command.run(*GANG, f"run={name}", f"data.path={text_file(folder)}", *QUICK, *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs" / f"llama_fsdp-{name}")


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    if not path.exists():
        path.write_text(Path(subprocess.__file__).read_text())
    return path


def until(condition: Callable[[], Any], timeout_s: float = 300.0, about: Callable[[], str] = str) -> Any:
    limit = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < limit, f"waited in vain {about()}"
        time.sleep(0.2)
    return value


def reached(run: RunDir, step: int, attempt: int = 1) -> None:
    """Waits until an attempt of a run has logged a step."""

    def newest() -> bool:
        rows = [row for found in run.attempts() if found.number >= attempt for row in _rows(found.metrics_path)]
        return any(row["kind"] == "train" and row["step"] >= step for row in rows)

    until(newest, about=lambda: told(run))


def ended(run: RunDir, outcome: str = "done", timeout_s: float = 400.0) -> None:
    """Waits until a run has ended for good, and checks how."""
    until(lambda: (verdict := run.attempts()[-1].verdict()) and verdict.outcome == outcome, timeout_s, lambda: told(run))


def losses(run: RunDir) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in run.metrics() if row["kind"] == "train"}


def resumed_at(run: RunDir, attempt: int) -> int:
    """Returns the completed steps an attempt began with."""
    return next(row["step"] for row in _rows(run.attempts()[attempt - 1].metrics_path) if row["kind"] == "start")


def nodes(run: RunDir, attempt: int) -> list[str]:
    """Returns where an attempt ran."""
    return next(event["nodes"] for event in run.attempts()[attempt - 1].events() if event["event"] == "start")


def job_id(run: RunDir) -> str:
    """Returns the job of a run's newest attempt."""
    return str(json.loads(run.attempts()[-1].job_path.read_text())["job_id"])


def told(run: RunDir) -> str:
    """Returns what a failed wait should show."""
    lines = [f"{run.name}: attempts {run.attempt_numbers()}"]
    for attempt in run.attempts():
        lines += [str(attempt.verdict()), str(attempt.error())]
        for log in [*attempt.launch.glob("slurm-*.log"), *attempt.path.glob("logs/rank-*.log")]:
            lines += [log.name, *log.read_text(errors="replace").splitlines()[-8:]]
    return "\n".join(lines)


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            # The last line may be half written.
            continue
    return rows


def workers(run: RunDir) -> dict[int, int]:
    """Returns the pid of each rank's worker."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = dict(pair.split("=", 1) for pair in (folder / "environ").read_text().split("\0") if "=" in pair)
            arguments = (folder / "cmdline").read_text().split("\0")
        except (OSError, ValueError):
            continue
        if environ.get("FACTORY_TRAIN_RUN_DIR") == str(run.path) and arguments[1:4] == ["-m", "factory_train.worker", "train"]:
            found[int(environ["FACTORY_TRAIN_RANK"])] = int(folder.name)
    return found
