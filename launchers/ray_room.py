"""Whether the nodes of a Ray cluster have room for a gang, and what to ask for where they have not. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A node takes a whole number of its own share; floats of resources are rounded at the fourth digit by Ray.
_TINY = 1e-4


@dataclass(frozen=True)
class NodeRoom:
    """One node that takes work.

    Args:
        name: for people.
        total: its resources ("CPU", "GPU").
        free: what of them no job holds; None where that is not known.
    """

    name: str
    total: Mapping[str, float]
    free: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Wanted:
    """What a gang needs.

    Args:
        nodes: how many machines.
        tasks_per_node: ranks of each.
        cpus_per_task: cores of a rank.
        gpus_per_node: cards of a machine; 0 for none.
    """

    nodes: int
    tasks_per_node: int
    cpus_per_task: int
    gpus_per_node: int

    @property
    def bundle(self) -> dict[str, float]:
        """What one node has to give: all ranks of a node or none, so that no gang is ever half there."""
        found = {"CPU": float(self.tasks_per_node * self.cpus_per_task)}
        return found | {"GPU": float(self.gpus_per_node)} if self.gpus_per_node else found

    def on_nodes(self, nodes: int) -> Wanted:
        """Returns the same on another number of machines."""
        return Wanted(nodes, self.tasks_per_node, self.cpus_per_task, self.gpus_per_node)

    def __str__(self) -> str:
        each = " and ".join(f"{value:g} {name}" for name, value in self.bundle.items())
        return f"{self.nodes} node{'s' if self.nodes != 1 else ''} with {each}{' each' if self.nodes != 1 else ''}"


@dataclass(frozen=True)
class Shortage:
    """Why a gang has no place.

    Args:
        what: what is needed and what is there.
        fix: overrides that would fit; None when waiting helps.
    """

    what: str
    fix: str | None


def fits(bundle: Mapping[str, float], have: Mapping[str, float]) -> bool:
    """Returns whether a node with `have` can give `bundle`."""
    return all(have.get(name, 0.0) + _TINY >= value for name, value in bundle.items())


def num_fitting(bundle: Mapping[str, float], nodes: Sequence[NodeRoom]) -> int:
    """Returns how many nodes can give `bundle` now, or at all where what is free is not known."""
    return sum(fits(bundle, node.total if node.free is None else node.free) for node in nodes)


def shortage(wanted: Wanted, nodes: Sequence[NodeRoom]) -> Shortage | None:
    """Returns why `wanted` cannot be placed on these nodes; None when it can."""
    if num_fitting(wanted.bundle, nodes) >= wanted.nodes:
        return None
    large = sum(fits(wanted.bundle, node.total) for node in nodes)
    if large >= wanted.nodes:
        free = num_fitting(wanted.bundle, nodes)
        return Shortage(f"{wanted} are needed; {large} are large enough, {free} of them free: it waits for other jobs", None)
    there = f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, the largest with {_largest(nodes)}" if nodes else "no node that takes work"
    return Shortage(f"{wanted} are needed, and the cluster has {there}", " or ".join(_smaller(wanted, nodes, large)) or None)


def _largest(nodes: Sequence[NodeRoom]) -> str:
    node = max(nodes, key=lambda node: (node.total.get("GPU", 0.0), node.total.get("CPU", 0.0)))
    return " and ".join(f"{node.total.get(name, 0.0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or node.total.get(name))


def _smaller(wanted: Wanted, nodes: Sequence[NodeRoom], large: int) -> list[str]:
    """Returns overrides with which it would fit: fewer nodes, or fewer ranks on each."""
    found = [f"launcher.nodes={large}"] if large else []
    for tasks in range(wanted.tasks_per_node - 1, 0, -1):
        gpus = wanted.gpus_per_node * tasks // wanted.tasks_per_node
        less = Wanted(wanted.nodes, tasks, wanted.cpus_per_task, gpus)
        if sum(fits(less.bundle, node.total) for node in nodes) >= wanted.nodes:
            cards = f" launcher.gpus_per_node={gpus}" if wanted.gpus_per_node else ""
            return [*found, f"launcher.tasks_per_node={tasks}{cards}"]
    if wanted.cpus_per_task > 1:
        found.append("launcher.cpus_per_task=FEWER")
    return found
