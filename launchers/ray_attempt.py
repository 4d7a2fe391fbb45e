"""One attempt of a gang on a Ray cluster: its stages through an agent on each node, and what nodes and people say meanwhile."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import ray

from factory_train import storage, switches
from factory_train.launchers.attempt_runner import AttemptRunner, Stop
from factory_train.launchers.inbox import Inbox
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.ray_gang import Gang, draining
from factory_train.run_dir import Attempt

_ANSWER_S = 0.2


class RayAttempt(AttemptRunner):
    """Runs one attempt on a gang that has its place.

    Args:
        attempt: whose orders are in launch/ray.json.
        job_id: submission id.
        gang: where its ranks go.
        inbox: signals arrive here.
    """

    def __init__(self, attempt: Attempt, job_id: str, gang: Gang, inbox: Inbox) -> None:
        super().__init__(attempt, storage.read_json(attempt.launch / "ray.json"), inbox, None)
        self._job_id, self._gang = job_id, gang

    def _place(self) -> dict[str, Any]:
        members = self._gang.members
        return {
            "job_id": self._job_id,
            "nodes": [member.name for member in members],
            "node_ids": [member.node_id for member in members],
            "pid": os.getpid(),
        }

    def _start(self, stage: str, orders: WorkerEnv) -> None:
        try:
            self._gang.start(stage, orders)
        except ray.exceptions.RayError as error:
            raise OSError(f"a stage could not be started: {str(error).splitlines()[0]}") from error

    def _poll(self) -> int | None:
        self._gang.refresh(_ANSWER_S)
        code = self._gang.result()
        if code is not None:
            for member in self._gang.lost:
                self._blame(member.name, member.lost or "")
        return code

    def _rest(self, timeout_s: float) -> None:
        """Asks the agents often, and the filesystem, whose heartbeats are as many as ranks, only once a second."""
        limit, heard = time.monotonic() + timeout_s, len(self._inbox.received)
        while (left := limit - time.monotonic()) > 0 and len(self._inbox.received) == heard:
            self._inbox.wait(min(_ANSWER_S, left))
            if self._gang.refresh(_ANSWER_S):
                return

    def _blame(self, node: str, how: str) -> None:
        """Puts a lost node in the place of what its peers said about it: they saw only that it was gone."""
        known = self._attempt.error()
        if known is not None and known.get("lost_node"):
            return
        rank = next(index for index, member in enumerate(self._gang.members) if member.name == node) * self._spec["gang"]["tasks_per_node"]
        self._attempt.record_launch_event("node-lost", node=node, how=how)
        message = f"node {node} was lost: {how}"
        hint = "ray status shows the nodes that are left; launcher.elastic.min_nodes lets a run go on with fewer"
        if known is None:
            self._record_error("train", rank, node, message, hint)
            known = self._attempt.error() or {}
            storage.write_json(self._attempt.error_path, known | {"lost_node": node})
        else:
            facts = {"stage": known.get("stage"), "rank": rank, "host": node, "message": message, "hint": hint, "lost_node": node}
            storage.write_json(self._attempt.error_path, {"time": known["time"], **facts, "traceback": None, "followed_by": known})

    def _stop(self) -> Stop | None:
        run = self._attempt.run
        if (stop := super()._stop()) is not None:
            return Stop("INT" if self._inbox.stop == signal.SIGINT else "TERM", stop.reason)
        if switches.is_on(run, switches.STOP):
            return Stop("INT", "asked to stop")
        if switches.is_on(run, switches.PREEMPT):
            return Stop("TERM", "asked to make room")
        if (member := self._gang.told) is not None:
            return Stop("TERM", f"node {member.name} was told that it will be taken away")
        going = draining()
        for member in self._gang.members:
            if member.node_id in going:
                return Stop("TERM", f"node {member.name} is being drained")
        return None

    def _end(self) -> None:
        self._gang.end()

    def close(self) -> None:
        """Gives the nodes back."""
        self._gang.close()

    def _tell_ranks(self, name: str) -> None:
        self._gang.signal(name)

    def _master(self) -> str:
        return self._gang.members[0].address

    def _host_of(self, rank: int) -> str:
        node = rank // self._spec["gang"]["tasks_per_node"]
        return self._gang.members[node].name if node < len(self._gang.members) else "?"

    def _unexplained(self, code: int) -> str:
        return f"a process ended with code {code} before it could say why"

    def _after(self, *, goes_on: bool) -> None:
        """Nothing to do: `ray_entry` reads the verdict, and starts the next attempt."""
