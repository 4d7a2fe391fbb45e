"""A gang on a Ray cluster: its placement group, an agent on each of its nodes, and what these say."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from factory_train import checks, storage
from factory_train.errors import ConfigError, ExitCode
from factory_train.launchers import ray_room
from factory_train.launchers.job import WorkerEnv
from factory_train.launchers.ray_agent import Exit, NodeAgent
from factory_train.launchers.ray_jobs import PLACEMENT_NAME
from factory_train.launchers.ray_room import NodeRoom, Wanted
from factory_train.run_dir import Attempt

# What an agent has to answer in, a start of its process included.
_HELLO_S = 60.0
# A poll that gets no answer for so long counts as one whose node is gone.
_SILENT_S = 30.0
# After the first failure the others have so long to end by themselves and say what they saw.
_PEER_GRACE_S = 5.0
_TURN_S = 0.5


@dataclass
class Member:
    """One node of a gang.

    Args:
        agent: the actor there.
        name: for people: host, and the node's number where a host has several.
        address: IP address of the node.
        node_id: Ray's name for it.
        asked: the poll that is under way.
        exits, running, told: its last answer.
        unreachable_since: when it was first found so, by time.monotonic(); None while it answers.
        lost: why it counts as gone.
    """

    agent: Any
    name: str
    address: str
    node_id: str
    asked: Any = None
    exits: list[Exit] = field(default_factory=list)
    running: int = 0
    told: bool = False
    unreachable_since: float | None = None
    lost: str | None = None


class Gang:
    """A gang that has its place.

    Args:
        group: holds the resources of all nodes, which were given together; None where they are somebody else's to give back.
        members: in the order of ranks.
        tasks_per_node: ranks of each.
    """

    def __init__(self, group: PlacementGroup | None, members: list[Member], tasks_per_node: int) -> None:
        self._group, self.members, self._tasks = group, members, tasks_per_node
        self._active: list[Member] = []
        self._failed_at: float | None = None

    def start(self, stage: str, orders: WorkerEnv) -> None:
        """Starts a stage: all ranks for `train`, one process on the first node for the others.

        Raises:
            RayError: a node was lost meanwhile, or cannot start its processes.
        """
        self._active = self.members if stage == "train" else self.members[:1]
        self._failed_at = None
        tasks = orders.local_world_size
        size = tasks * len(self._active)
        started = []
        for index, member in enumerate(self._active):
            member.exits, member.running, member.told, member.asked = [], tasks, False, None
            shares = [replace(orders, rank=index * tasks + local, local_rank=local, world_size=size, lifeline=1) for local in range(tasks)]
            started.append(member.agent.start.remote(stage, shares))
        ray.get(started, timeout=_HELLO_S)

    def refresh(self, timeout_s: float) -> bool:
        """Asks every node how its processes are, and waits at most `timeout_s` for the answers; returns whether there is news."""
        before = [(member.exits, member.told, member.lost) for member in self._active]
        for member in self._active:
            if member.asked is None and member.lost is None:
                member.asked = member.agent.poll.remote()
        asked = [member.asked for member in self._active if member.asked is not None]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=timeout_s)
        for member in self._active:
            if member.asked is not None:
                self._take_answer(member)
        return before != [(member.exits, member.told, member.lost) for member in self._active]

    def _take_answer(self, member: Member) -> None:
        try:
            member.exits, member.running, member.told = ray.get(member.asked, timeout=0)
            member.unreachable_since = None
        except ray.exceptions.GetTimeoutError:
            self._doubt(member)
            return
        except ray.exceptions.ActorUnavailableError:
            # A connection that broke; Ray itself cannot tell yet whether the node is gone.
            self._doubt(member)
        except ray.exceptions.RayError as error:
            member.lost = f"the process of Ray that held its ranks is gone ({_first_line(error)})"
        member.asked = None

    def _doubt(self, member: Member) -> None:
        now = time.monotonic()
        member.unreachable_since = member.unreachable_since or now
        if now - member.unreachable_since > _SILENT_S:
            member.lost = f"it did not answer for {_SILENT_S:.0f} s"

    @property
    def lost(self) -> list[Member]:
        """Nodes that are gone."""
        return [member for member in self.members if member.lost is not None]

    @property
    def told(self) -> Member | None:
        """A node whose ranks were told to save and stop from outside."""
        return next((member for member in self._active if member.told), None)

    def result(self) -> int | None:
        """Returns the exit code of the stage, None while it goes on: 0 when all have done what they were asked to."""
        failed = [found.code for member in self._active for found in member.exits if found.code not in (0, ExitCode.PREEMPTED)]
        if failed or self.lost:
            self._failed_at = self._failed_at or time.monotonic()
            others = any(member.running for member in self._active if member.lost is None)
            if others and time.monotonic() - self._failed_at < _PEER_GRACE_S:
                return None
            for member in self._active:
                # Ranks elsewhere failed, and nothing is heard from here: this is why.
                if member.unreachable_since is not None and member.lost is None:
                    member.lost = "it does not answer"
            self.end()
            return failed[0] if failed else int(ExitCode.FAILED)
        if any(member.running for member in self._active):
            return None
        return max(found.code for member in self._active for found in member.exits)

    def signal(self, name: str) -> None:
        """Sends a signal to every rank that can still be reached."""
        for member in self._active:
            if member.lost is None:
                member.agent.signal.remote(name)

    def end(self) -> None:
        """Ends every process of the stage."""
        _settle([member.agent.end.remote() for member in self._active if member.lost is None])
        self._active = []

    def close(self) -> None:
        """Gives everything back. A cluster that is gone has taken it already."""
        with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
            self.end()
            for member in self.members:
                ray.kill(member.agent)
            if self._group is not None:
                remove_placement_group(self._group)


def _settle(calls: Sequence[Any], timeout_s: float = 15.0) -> None:
    """Waits for calls whose failure means nothing: the actor is gone, and its processes with it."""
    if calls:
        ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class Waiting:
    """Says why a job has no place, to `status` and in its events, once for every change.

    Args:
        attempt: of the run or of an island.
        wanted: what it waits for.
    """

    def __init__(self, attempt: Attempt, wanted: Wanted) -> None:
        self._attempt, self._wanted, self._said = attempt, wanted, ""

    def goes_on(self, nodes: Sequence[NodeRoom]) -> None:
        """Notes that there is no place yet on these nodes."""
        found = ray_room.shortage(self._wanted, nodes)
        what = found.what if found else f"{self._wanted} are needed: Ray is about to give them"
        if what != self._said:
            self._said = what
            state = {"state": "waiting", "what": what, "fix": found.fix if found else None, "since": time.time()}
            storage.write_json(self._attempt.launch / PLACEMENT_NAME, state)
            self._attempt.record_launch_event("waiting", reason=what, fix=state["fix"])

    def is_over(self, nodes: Sequence[str]) -> None:
        """Notes the names of the nodes that were given."""
        storage.write_json(self._attempt.launch / PLACEMENT_NAME, {"state": "placed", "nodes": list(nodes), "since": time.time()})


class Placement:
    """Finds a place for a gang, with fewer nodes where that is allowed, and says meanwhile why there is none.

    Args:
        attempt: whose gang it is.
        spec: content of launch/ray.json. The placement group it names, if it does, is tried first: somebody else's, and maybe ready.
    """

    def __init__(self, attempt: Attempt, spec: dict[str, Any]) -> None:
        self._attempt, self._spec = attempt, spec
        self._wanted = Wanted(**spec["wanted"])
        self._waiting = Waiting(attempt, self._wanted)

    def wait(self, stopped: Callable[[], bool], beat: Callable[[], None]) -> Gang | None:
        """Returns the gang once it has its place; None when `stopped` says so first."""
        wanted = self._wanted
        began = time.monotonic()
        reserved = find_group(self._spec.get("group"))
        while not stopped():
            group = reserved or make_group(wanted, f"{self._attempt.run.name}-{self._attempt.number:04d}-{secrets.token_hex(2)}")
            gang = None
            try:
                while gang is None and not stopped():
                    beat()
                    if group.wait(timeout_seconds=_TURN_S):
                        gang = staff(self._attempt, group, wanted, is_own=reserved is None)
                        # Given on a node that had just died: once more, when Ray knows it too.
                        began = time.monotonic()
                        break
                    waited = time.monotonic() - began
                    # A moment is what placing takes; only then is it waiting.
                    if waited > 2 * _TURN_S:
                        nodes = rooms()
                        self._waiting.goes_on(nodes)
                        if waited > self._spec["elastic_wait_s"] and (smaller := self._smaller(wanted, nodes)) != wanted:
                            wanted = smaller
                            break
            finally:
                if gang is None:
                    remove_placement_group(group)
            reserved = None
            if gang is not None:
                self._waiting.is_over([member.name for member in gang.members])
                if wanted != self._wanted:
                    self._attempt.record_launch_event("elastic", nodes=wanted.nodes, wanted=self._wanted.nodes)
                return gang
        return None

    def _smaller(self, wanted: Wanted, nodes: Sequence[NodeRoom]) -> Wanted:
        """Returns the most nodes that have room now and that the run may go on with; `wanted` when there are none."""
        room = ray_room.num_fitting(wanted.bundle, nodes)
        for count in range(min(room, self._wanted.nodes), self._spec["min_nodes"] - 1, -1):
            try:
                checks.check_world(self._attempt.config(), count * wanted.tasks_per_node)
            except ConfigError:
                continue
            return wanted.on_nodes(count)
        return wanted


def make_group(wanted: Wanted, name: str) -> PlacementGroup:
    """Returns a placement group of one gang, which has its place or will have it: a bundle a node, each on another node.

    Args:
        name: of no other group in the job.
    """
    return placement_group([wanted.bundle] * wanted.nodes, strategy="STRICT_SPREAD", name=name)


def find_group(name: str | None) -> PlacementGroup | None:
    """Returns a placement group that another driver of the job has made; None where there is none of that name."""
    if name is None:
        return None
    try:
        return get_placement_group(name)
    except ValueError:
        return None


def staff(attempt: Attempt, group: PlacementGroup, wanted: Wanted, *, is_own: bool) -> Gang | None:
    """Starts an agent in each of the first bundles of a group; None when one does not answer, and then none is left.

    Args:
        wanted: how many, and what each takes.
        is_own: whether the gang gives the group back when it is closed.
    """
    kind = ray.remote(NodeAgent)
    run_dir, number = str(attempt.run.path), attempt.number
    bundle = wanted.bundle
    agents = [
        kind.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            memory=bundle.get("memory"),
            resources=dict(wanted.resources),
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote(run_dir, number)
        for index in range(wanted.nodes)
    ]
    try:
        said = ray.get([agent.hello.remote() for agent in agents], timeout=_HELLO_S)
    except ray.exceptions.RayError as error:
        attempt.record_launch_event("not-staffed", reason=_first_line(error))
        for agent in agents:
            ray.kill(agent)
        return None
    names = distinct([(facts["host"], facts["node_id"]) for facts in said])
    members = [
        Member(agent=agent, name=name, address=facts["address"], node_id=facts["node_id"])
        for agent, name, facts in zip(agents, names, said, strict=True)
    ]
    return Gang(group if is_own else None, members, wanted.tasks_per_node)


def distinct(nodes: Sequence[tuple[str, str]]) -> list[str]:
    """Returns names of nodes for people: the host, and Ray's id behind it where a host has several of them.

    Args:
        nodes: host and id of each.
    """
    hosts = [host for host, _ in nodes]
    return [host if hosts.count(host) == 1 else f"{host}/{node_id[:8]}" for host, node_id in nodes]


def rooms() -> list[NodeRoom]:
    """Returns the nodes of the cluster that take work, with what is free on each."""
    free = ray._private.state.available_resources_per_node()
    drained = draining()
    return [
        NodeRoom(node["NodeName"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in drained
    ]


def draining() -> dict[str, int]:
    """Returns the ids of nodes that will be taken away, each with when, in milliseconds since the epoch; 0 where nobody says.

    Ray has no public name for it; Ray Train reads the same.
    """
    return dict(ray._private.state.state.get_draining_nodes())
