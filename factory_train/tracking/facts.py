"""What a run directory says about a run, gathered in one place for the tracker and the report."""

from __future__ import annotations

import functools
import hashlib
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.config import Config
from factory_train.errors import NotFoundError
from factory_train.run_dir import Attempt, RunDir

_CHECKPOINT_NAME = re.compile(r"step-\d+")


@dataclass(frozen=True)
class RunFacts:
    """One look at a run. What is not there yet, or never will be, is empty.

    Args:
        info: run.json.
        attempt: the newest.
        config: of the newest attempt.
        plan, job, code: plan.json, job.json and code.json of the newest attempt.
        manifest: of the run's own copy of the data.
        evaluations: evaluation/step-*.json, by step.
        checkpoints: names of the committed checkpoints, oldest first.
        world_size: ranks of the newest attempt; None before they start.
    """

    run: RunDir
    info: dict[str, Any]
    attempt: Attempt
    config: Config
    plan: dict[str, Any]
    job: dict[str, Any]
    code: dict[str, Any]
    manifest: dict[str, Any]
    evaluations: list[dict[str, Any]]
    checkpoints: list[str]
    world_size: int | None

    @property
    def outcome(self) -> str:
        """How the newest attempt ended; "running", "pending" (not started yet) or "lost" (stopped without a word) before that."""
        if verdict := self.attempt.verdict():
            return verdict.outcome
        if self.run.is_alive():
            return "running"
        # Alive is not known of a job that waits in a queue elsewhere; it has not left a sign of life either.
        began = self.attempt.last_heartbeat() is not None or self.attempt.metrics_path.exists()
        return "lost" if began or self.job.get("host") == socket.gethostname() else "pending"

    @property
    def num_parameters(self) -> int | None:
        params = self.plan.get("params")
        return params.get("total") if isinstance(params, dict) else None

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """The newest evaluation."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def baselines(self) -> dict[str, float]:
        """Cross-entropy of models that only count, in nats a token."""
        return (self.evaluation or {}).get("baselines") or self.manifest.get("baselines") or {}

    @property
    def data_id(self) -> str | None:
        if self.manifest.get("id"):
            return str(self.manifest["id"])
        return file_sha256(self.run.data / "manifest.json")

    @property
    def tokenizer_sha256(self) -> str | None:
        return file_sha256(self.run.data / "tokenizer.json")

    @property
    def config_sha256(self) -> str | None:
        return file_sha256(self.attempt.config_path)


def read_facts(run: RunDir) -> RunFacts:
    """Reads the small files of a run directory.

    Raises:
        NotFoundError: the run was never started.
    """
    attempt = run.last_attempt()
    if attempt is None:
        raise NotFoundError("the run has no attempt yet", where=run.name)
    plan, job = _object(attempt.path / "plan.json"), _object(attempt.job_path)
    heartbeats = len(list((attempt.path / "heartbeat").glob("rank-*")))
    return RunFacts(
        run=run,
        info=run.info(),
        attempt=attempt,
        config=attempt.config(),
        plan=plan,
        job=job,
        code=_object(attempt.path / "code.json"),
        manifest=_object(run.data / "manifest.json"),
        evaluations=sorted((_object(path) for path in run.evaluation.glob("step-*.json")), key=lambda value: value.get("step", 0)),
        checkpoints=sorted(path.name for path in run.checkpoints.glob("step-*") if _CHECKPOINT_NAME.fullmatch(path.name)),
        world_size=job.get("world_size") or plan.get("world_size") or heartbeats or None,
    )


def html_report_path(run: RunDir) -> Path:
    return run.path / "report.html"


def _object(path: Path) -> dict[str, Any]:
    value = storage.read_json(path)
    return value if isinstance(value, dict) else {}


def file_sha256(path: Path) -> str | None:
    """Returns the hash of a file, remembered while its size and time stay the same; None when it is not there."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _sha256(path: Path, _size: int, _mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
