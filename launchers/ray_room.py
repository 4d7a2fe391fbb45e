"""Whether the nodes of a Ray cluster have room for the gangs of a job, and what to ask for where they have not. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

# A node takes a whole number of its own share; floats of resources are rounded at the fourth digit by Ray.
_TINY = 1e-4
_GIB = 2**30


@dataclass(frozen=True)
class NodeRoom:
    """One node that takes work.

    Args:
        name: for people.
        total: its resources ("CPU", "GPU", "memory" in bytes, and a site's own).
        free: what of them no job holds; None where that is not known.
    """

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float] | None = None

    @property
    def have(self) -> Mapping[str, float]:
        """What is free, or all there is where that is not known."""
        return self.total if self.free is None else self.free


@dataclass(frozen=True)
class Wanted:
    """What the gangs of a job need, all of them alike.

    Args:
        nodes: machines of each gang.
        tasks_per_node: ranks of each.
        cpus_per_task: cores of a rank.
        gpus_per_node: cards of a machine; 0 for none.
        memory_bytes: of a machine; 0 where it does not matter.
        resources: of a machine, by the site's own names.
        gangs: how many; two of them may share a machine, two nodes of one may not.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int
    memory_bytes: int = 0
    resources: Mapping[str, float] = field(default_factory=dict)
    gangs: int = 1

    @property
    def bundle(self) -> dict[str, float]:
        """What one node has to give: all ranks of a node or none, so that no gang is ever half there."""
        found = {
            "CPU": float(self.tasks_per_node * self.cpus_per_task),
            "GPU": float(self.gpus_per_node),
            "memory": float(self.memory_bytes),
        }
        return {name: value for name, value in {**found, **self.resources}.items() if value}

    def on_nodes(self, nodes: int) -> Wanted:
        """Returns the same on another number of machines."""
        return replace(self, nodes=nodes)

    def __str__(self) -> str:
        each = _amounts(self.bundle)
        text = f"{self.nodes} node{'s' if self.nodes != 1 else ''} with {each}{' each' if self.nodes != 1 else ''}"
        return text if self.gangs == 1 else f"{self.gangs} islands of {text}"


@dataclass(frozen=True)
class Shortage:
    """Why a job has no place.

    Args:
        what: what is needed and what is there.
        fix: overrides that would fit; None when waiting helps.
    """

    what: str
    fix: str | None


def times(bundle: Mapping[str, float], have: Mapping[str, float]) -> int:
    """Returns how often a node with `have` can give `bundle`."""
    return min(int((have.get(name, 0.0) + _TINY) // value) for name, value in bundle.items())


def num_fitting(bundle: Mapping[str, float], nodes: Sequence[NodeRoom]) -> int:
    """Returns how many nodes can give `bundle` now, or at all where what is free is not known."""
    return sum(times(bundle, node.have) > 0 for node in nodes)


def num_gangs(wanted: Wanted, nodes: Sequence[NodeRoom]) -> int:
    """Returns how many of the gangs have room at once, each on different nodes."""
    room = [times(wanted.bundle, node.have) for node in nodes]
    # A node helps each of m gangs once at most; where the sum is enough, dealing the nodes out in turn finds a place for all.
    return next((count for count in range(wanted.gangs, 0, -1) if sum(min(count, each) for each in room) >= count * wanted.nodes), 0)


def shortage(wanted: Wanted, nodes: Sequence[NodeRoom]) -> Shortage | None:
    """Returns why `wanted` cannot be placed on these nodes; None when it can."""
    if num_gangs(wanted, nodes) >= wanted.gangs:
        return None
    empty = [replace(node, free=None) for node in nodes]
    most = num_gangs(wanted, empty)
    if most >= wanted.gangs:
        large, with_room = num_fitting(wanted.bundle, empty), num_fitting(wanted.bundle, nodes)
        # What a job of several gangs tries out to hold is no more free than what others hold, so it names no number.
        there = f"{large} are large enough, {with_room} of them free" if wanted.gangs == 1 else "they are not free together"
        return Shortage(f"{wanted} are needed; {there}: it waits for other jobs", None)
    there = "no node that takes work"
    if nodes:
        there = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, the largest with {_largest(wanted, nodes)}"
    fix = " or ".join(_smaller(wanted, empty, most)) or None
    return Shortage(f"{wanted} are needed, and the cluster has {there}", fix)


def _largest(wanted: Wanted, nodes: Sequence[NodeRoom]) -> str:
    node = max(nodes, key=lambda node: [node.total.get(name, 0.0) for name in ("GPU", "CPU", "memory")])
    there = {name: value for name, value in node.total.items() if name == "GPU" and value}
    return _amounts({"CPU": node.total.get("CPU", 0.0)} | there | {name: node.total.get(name, 0.0) for name in wanted.bundle})


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(
        f"{value / _GIB:.4g} GiB of memory" if name == "memory" else f"{value:g} {name}" for name, value in resources.items()
    )  # fmt: skip


def _smaller(wanted: Wanted, nodes: Sequence[NodeRoom], most: int) -> list[str]:
    """Returns overrides with which it would fit: fewer gangs, fewer nodes, fewer ranks on each, or less besides.

    Args:
        nodes: with nothing running on them.
        most: how many of the gangs they hold.
    """

    def holds(less: Wanted) -> bool:
        return num_gangs(less, nodes) >= less.gangs

    found = [f"diloco.islands={most}"] if most else []
    found += [f"launcher.nodes={count}" for count in range(wanted.nodes - 1, 0, -1) if holds(wanted.on_nodes(count))][:1]
    for tasks in range(wanted.tasks_per_node - 1, 0, -1):
        gpus = wanted.gpus_per_node * tasks // wanted.tasks_per_node
        if holds(replace(wanted, tasks_per_node=tasks, gpus_per_node=gpus)):
            cards = f" launcher.gpus_per_node={gpus}" if wanted.gpus_per_node else ""
            return [*found, f"launcher.tasks_per_node={tasks}{cards}"]
    if wanted.memory_bytes and holds(replace(wanted, memory_bytes=0)):
        sizes = range(wanted.memory_bytes // _GIB, 0, -1)
        size = next((size for size in sizes if holds(replace(wanted, memory_bytes=size * _GIB))), None)
        found += [f"launcher.memory={size}G"] if size else []
    if wanted.resources and holds(replace(wanted, resources={})):
        found.append("launcher.resources={}")
    if wanted.cpus_per_task > 1:
        found.append("launcher.cpus_per_task=FEWER")
    return found
