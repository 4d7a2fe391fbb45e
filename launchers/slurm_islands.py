"""Islands within one Slurm job: which nodes are whose, and a step for each that is started again within the job."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from factory_train import storage
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.environment import import_environ
from factory_train.launchers.inbox import END_SIGNAL
from factory_train.launchers.islands import Island, Running
from factory_train.launchers.job import Gang
from factory_train.run_dir import Attempt

# A step of many ranks is not gone at once.
_END_S = 70.0


@dataclass(frozen=True)
class Share:
    """Where an island is.

    Args:
        nodes: its nodes.
        place: its place among the islands that share them.
        of: how many these are.
    """

    nodes: tuple[str, ...]
    place: int
    of: int


def whole(gangs: Sequence[Gang], islands_per_node: int) -> Gang:
    """Returns what Slurm is asked for: groups of nodes, each with room for `islands_per_node` islands."""
    first, together = gangs[0], min(islands_per_node, len(gangs))
    return Gang(first.name, -(-len(gangs) // together) * first.nodes, together * first.tasks_per_node)


def shares(num_islands: int, nodes_each: int, islands_per_node: int, nodes: Sequence[str]) -> list[Share]:
    """Returns where each island of a job is.

    Args:
        nodes_each: nodes of an island.
        nodes: of the job, in Slurm's order.
    """
    together = min(islands_per_node, num_islands)
    found = []
    for index in range(num_islands):
        first = index // together * nodes_each
        of = min(together, num_islands - index // together * together)
        found.append(Share(tuple(nodes[first : first + nodes_each]), index % together, of))
    return found


def step_spec(spec: Mapping[str, Any], gang: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """Returns the orders of an island's own launcher (launch/slurm.json of its attempt), made from those of the job."""
    own = {"gang": dict(gang), "nodes": list(share.nodes), "share": [share.place, share.of], "stages": ["train"], "attached": True}
    # What follows an attempt, and what surrounds the training, is the business of the job.
    return {**spec, **own, "num_nodes": len(share.nodes), "islands": None, "requeue": "never", "tracker": False, "preflight": False}


def own_cards(shown: str | None, share: Sequence[int], each: int) -> str | None:
    """Returns the cards of an island among those that a node's islands share; None where there are not enough, or none.

    Args:
        shown: CUDA_VISIBLE_DEVICES as Slurm set it.
        share: place among the islands of the node, and their number.
        each: ranks of an island on the node.
    """
    place, of = share
    cards = shown.split(",") if shown else []
    return ",".join(cards[place * each : (place + 1) * each]) if of > 1 and len(cards) >= of * each else None


class IslandSteps:
    """Starts the islands of a job: for each a process of `slurm_batch` beside this one, which runs a step on the island's nodes.

    Args:
        spec: content of the job's launch/slurm.json.
        nodes: of the job, in Slurm's order.
        job_id: as squeue shows it.
    """

    def __init__(self, spec: Mapping[str, Any], nodes: Sequence[str], job_id: str) -> None:
        self._spec, self._job_id = spec, job_id
        gang = spec["gang"]
        self._shares = shares(len(spec["islands"]), gang["nodes"], spec["islands_per_node"], nodes)
        self._attempts: dict[str, Attempt] = {}

    def start(self, island: Island, attempt: Attempt) -> Running:
        """See `Starter`."""
        self._attempts[island.name] = attempt
        storage.write_json(attempt.launch / "slurm.json", step_spec(self._spec, island.gang, self._shares[island.index]))
        facts = {"run_dir": str(attempt.run.path), "attempt": attempt.number, "gangs": [island.gang], "stages": ["train"]}
        job = {"format_version": 1, "launcher": "slurm", "job_id": self._job_id, "job_ids": [self._job_id], **facts}
        storage.write_json(attempt.job_path, job)
        # How the batch script was bound to cores says nothing about this step.
        environ = {name: value for name, value in import_environ(os.environ).items() if not name.startswith("SLURM_CPU_BIND")}
        module, arguments = "factory_train.launchers.slurm_batch", [str(attempt.run.path), str(attempt.number)]
        return Child.start(island.name, island.index, module, arguments, environ, attempt.launch / "steps.log")

    def end(self, started: Sequence[Running]) -> None:
        """See `Starter`."""
        children = [child for child in started if isinstance(child, Child)]
        for child in children:
            if child.running:
                # It ends its step first; a step whose srun was killed goes on.
                child.signal(END_SIGNAL)
        for child in children:
            try:
                child.process.wait(_END_S)
            except subprocess.TimeoutExpired:
                continue
        end_all(children)

    def told(self) -> tuple[str, str] | None:
        """Returns the signal (TERM, INT) that Slurm or a person sent to an island alone, and which; None where none was.

        Slurm tells only the ranks that a job will be ended, and not all at the same time.
        """
        for outcome, name in (("interrupted", "INT"), ("preempted", "TERM")):
            for island, attempt in self._attempts.items():
                verdict = attempt.verdict()
                if verdict is not None and verdict.outcome == outcome:
                    return name, f"{island}: {verdict.reason}"
        return None
