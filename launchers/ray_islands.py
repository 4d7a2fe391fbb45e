"""One attempt of a Ray job with several gangs: training on all islands, each with a driver and a placement group of its own.

The stages around training run on a node of one of them. An island that fails is started again, where there is room, while the
others go on; an island whose node is drained saves, leaves, and comes back elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

from factory_train import storage
from factory_train.errors import ExitCode
from factory_train.launchers.attempt_runner import End
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.islands import Island, Running, Starter
from factory_train.launchers.ray_attempt import RayAttempt
from factory_train.launchers.ray_gang import Gang
from factory_train.launchers.ray_places import Places
from factory_train.run_dir import Attempt


class IslandsAttempt(RayAttempt):
    """Runs one attempt of a job with several gangs.

    Args:
        attempt: whose orders are in launch/ray.json.
        job_id: submission id.
        places: of its islands.
        inbox: signals arrive here.
    """

    def __init__(self, attempt: Attempt, job_id: str, places: Places, inbox: Inbox) -> None:
        super().__init__(attempt, job_id, Gang(None, [], 1), inbox)
        self._places = places

    def _place(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "islands": [island["name"] for island in self._spec["islands"]], "pid": os.getpid()}

    def _run_stage(self, stage: str) -> End | None:
        if stage == "train":
            return super()._run_stage(stage)
        gang = self._places.desk(lambda: self._stop() is not None, self._pulse.beat)
        if gang is None:
            stop = self._stop()
            assert stop is not None
            return self._stopped(stop, f"before stage '{stage}'")
        self._gang = gang
        try:
            return super()._run_stage(stage)
        finally:
            self._gang = Gang(None, [], 1)
            gang.close()

    def _starter(self) -> Starter:
        return Drivers(self._attempt, self._spec, self._job_id, self._places)

    def close(self) -> None:
        """See `RayAttempt`."""
        super().close()
        self._places.close()


class Drivers:
    """Starts islands: a driver process for each, here, whose actors are where its placement group is. See `islands.Starter`.

    Args:
        attempt: of the run.
        spec: content of its launch/ray.json.
        job_id: submission id.
        places: of the islands.
    """

    def __init__(self, attempt: Attempt, spec: dict[str, Any], job_id: str, places: Places) -> None:
        self._attempt, self._spec, self._job_id, self._places = attempt, spec, job_id, places

    def start(self, island: Island, attempt: Attempt) -> Running:
        """See `Starter`."""
        group = self._places.name_for(island.name)
        wanted = {**self._spec["wanted"], "gangs": 1}
        mine = {"gang": island.gang, "wanted": wanted, "islands": [], "stages": ["train"], "tracker": False, "group": group}
        storage.write_json(attempt.launch / "ray.json", {**self._spec, **mine, "meets_others": True})
        job = {"run_dir": str(attempt.run.path), "attempt": attempt.number, "gangs": [island.gang], "stages": ["train"]}
        storage.write_json(attempt.job_path, {**storage.read_json(self._attempt.job_path), **job})
        arguments = [str(attempt.run.path), str(attempt.number), self._job_id]
        log = attempt.launch / "driver.log"
        return Child.start(island.name, island.index, "factory_train.launchers.ray_driver", arguments, os.environ, log)

    def end(self, started: Sequence[Running]) -> None:
        """See `Starter`. The place of an island that has done all steps is kept for what follows."""
        children = cast(Sequence[Child], started)
        end_all(children, gently=True)
        for child in children:
            if child.exit_code != ExitCode.OK:
                self._places.give_back(child.name)
