"""The first node of a job of islands, where their launcher is, as the others see it.

When it is lost, Slurm lets the other nodes go on (`--no-kill`), with islands that nobody starts again, evaluates or ends, in a job that
would last to its time limit. So an island that is left has the job started again, or ended where nobody wants that.
"""

from __future__ import annotations

import time

from factory_train import storage, switches
from factory_train.errors import ExitCode, FactoryTrainError
from factory_train.gangs import run_of_island
from factory_train.launchers import autopsy, pulse, slurm_queue
from factory_train.launchers.slurm_restart import Restart
from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt

# A launcher that gives no sign for so many looks is looked for.
_QUIET_LOOKS = 6


class FirstNode:
    """What one island knows of it.

    Args:
        of_island: the island's attempt.
        job_id: of the job.
    """

    def __init__(self, of_island: Attempt, job_id: str) -> None:
        main = run_of_island(of_island.run).last_attempt()
        assert main is not None
        self._main, self._island, self._job_id = main, of_island.run.name, job_id
        self._spec = storage.read_json(main.launch / "slurm.json")
        self._heartbeat = pulse.path_of(main)
        # The launcher's last sign, since how many looks it is that, and when to look again.
        self._sign: float | None = None
        self._quiet, self._next_look = 0, 0.0

    def look(self) -> None:
        """Sees to the job if the node is lost; call it as often as you like."""
        # An allocation that was there before is not ours to end.
        if (now := time.monotonic()) < self._next_look or "nodes" in self._spec:
            return
        self._next_look = now + HEARTBEAT_EVERY_S
        try:
            sign = self._heartbeat.stat().st_mtime
        except OSError:
            # Not there yet, or a bad moment of the filesystem.
            return
        self._quiet = self._quiet + 1 if sign == self._sign else 0
        self._sign = sign
        if self._quiet >= _QUIET_LOOKS:
            # Slurm is asked once in so many looks.
            self._quiet = 0
            if (lost := self._lost()) is not None:
                self._see_to_job(lost)

    def _lost(self) -> str | None:
        """Returns the node if it has left the job."""
        start = next((event for event in reversed(self._main.events()) if event["event"] == "start"), None)
        left = slurm_queue.running_on(self._job_id)
        return start["nodes"][0] if start and left and start["nodes"][0] not in left else None

    def _see_to_job(self, lost: str) -> None:
        main = self._main
        reason = f"{lost}, the first node of the job, was lost, and the launcher with it"
        # Whoever is first; later the job may be another start of itself.
        if not storage.write_json_once(main.launch / "first-node-lost.json", {"node": lost, "noticed_by": self._island}):
            return
        main.record_launch_event("first-node-lost", node=lost, noticed_by=self._island)
        stopped = switches.is_on(main.run, switches.STOP)
        outcome, code = ("interrupted", ExitCode.INTERRUPTED) if stopped else ("failed-transient", ExitCode.FAILED)
        how = self._spec["requeue"]
        try:
            main.write_verdict(outcome, code, step=autopsy.last_step(main), reason=reason)
            if not Restart(main, self._job_id, how).ask() or how != "requeue":
                # Its islands save when they are told so; with a chain the next job of it follows.
                slurm_queue.cancel([self._job_id])
        except FactoryTrainError as error:
            main.record_launch_event("first-node-left", reason=str(error).splitlines()[0])
