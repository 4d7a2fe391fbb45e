"""Islands on this machine: a supervisor process for each, with cards of its own where there are enough."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from factory_train import storage
from factory_train.hardware import visible_cards
from factory_train.launchers import attempts
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.environment import import_environ
from factory_train.launchers.islands import Island, Running
from factory_train.run_dir import Attempt, process_started_at


class Supervisors:
    """Starts islands of a local job.

    Args:
        job: content of its job.json.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._job = job

    def start(self, island: Island, attempt: Attempt) -> Running:
        """See `Starter`."""
        log = attempt.launch / "supervisor.log"
        arguments = [str(attempt.run.path), str(attempt.number)]
        environ = import_environ(os.environ)
        child = Child.start(island.name, island.index, "factory_train.launchers.supervisor", arguments, environ, log)
        pid = child.process.pid
        job = {
            **self._job,
            "pid": pid,
            "pid_started": process_started_at(pid),
            "run_dir": str(attempt.run.path),
            "attempt": attempt.number,
            "detached": False,
            "gangs": [island.gang],
            "islands": False,
            "stages": ["train"],
            "tracker": False,
            "environ": self._job["environ"] | self._cards(island),
        }
        # Known as long as nothing has been saved: after three such starts without a newer checkpoint there is no fourth.
        attempt.record_launch_event("start", checkpoint=attempts.newest_checkpoint_step(attempt.run))
        storage.write_json(attempt.job_path, job)
        return child

    def end(self, started: Sequence[Running]) -> None:
        """See `Starter`."""
        end_all(cast(Sequence[Child], started), gently=True)

    def _cards(self, island: Island) -> dict[str, str]:
        each, cards = island.gang["tasks_per_node"], len(visible_cards())
        if cards < each * len(self._job["gangs"]):
            return {}
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": ",".join(shown[island.index * each : (island.index + 1) * each])}
