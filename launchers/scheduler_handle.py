"""What the handles of jobs in a scheduler's hands have in common: all they know is in job.json, and they can only ask."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train.run_dir import Attempt, RunDir

_POLL_S = 1.0


@dataclass
class SchedulerHandle:
    """A job that a scheduler was given.

    Args:
        job: content of job.json.
    """

    job: dict[str, Any]

    @property
    def attempt(self) -> Attempt:
        return Attempt(RunDir(Path(self.job["run_dir"])), self.job["attempt"])

    @property
    def job_ids(self) -> list[str]:
        """The job, and those of its chain behind it."""
        return list(self.job["job_ids"])

    @property
    def exit_code(self) -> int | None:
        return None

    def to_json(self) -> dict[str, Any]:
        return self.job

    def status(self) -> str:
        """Returns "running", "pending" or "ended"."""
        raise NotImplementedError

    def wait(self, timeout_s: float | None = None) -> bool:
        limit = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        while self.status() != "ended":
            if time.monotonic() >= limit:
                return False
            time.sleep(max(0.0, min(_POLL_S, limit - time.monotonic())))
        return True
