"""What the launcher's keys mean on a Ray cluster, and which of them cannot be right there."""

from __future__ import annotations

import re

from factory_train.config import LauncherConfig
from factory_train.errors import ConfigError, PreflightError
from factory_train.launchers import ray_api, ray_room
from factory_train.launchers.job import Gang
from factory_train.launchers.ray_api import RayApi
from factory_train.launchers.ray_room import Wanted

# launcher.address for a cluster of our own on this machine.
OWN = "local"
# As sbatch --mem takes it: megabytes where no unit is given.
_MEMORY = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}
# What has a key of its own.
_OWN_KEYS = {"CPU": "launcher.cpus_per_task", "GPU": "launcher.gpus_per_node", "memory": "launcher.memory"}


def wanted(gangs: tuple[Gang, ...], options: LauncherConfig) -> Wanted:
    """Returns what the gangs of a job need of the cluster.

    Raises:
        ConfigError: launcher.memory is no size.
    """
    return Wanted(
        gangs[0].nodes,
        gangs[0].tasks_per_node,
        options.cpus_per_task or 1,
        options.gpus_per_node or 0,
        _memory_bytes(options.memory) if options.memory else 0,
        dict(options.resources),
        len(gangs),
    )


def check(options: LauncherConfig, *, islands: bool = False) -> str:
    """Checks what can be wrong about the Ray keys before a cluster is asked; returns the address that is meant, "local" for our own.

    Args:
        islands: whether the gangs of the job exchange what they learned.

    Raises:
        ConfigError: keys that contradict each other, that only Slurm knows, or no address.
    """
    least = options.elastic.min_nodes
    if islands and least is not None:
        raise ConfigError(
            "islands exchange shard by shard and keep their size; what may shrink is their number, down to diloco.quorum",
            where="launcher.elastic.min_nodes",
            fix="launcher.elastic.min_nodes=null",
        )
    if least is not None and not 1 <= least <= options.nodes:
        raise ConfigError(
            f"{least} is not between 1 and launcher.nodes={options.nodes}",
            where="launcher.elastic.min_nodes",
            fix="launcher.elastic.min_nodes=1",
        )
    if options.address == OWN and options.nodes != 1:
        raise ConfigError(
            f"{options.nodes} nodes, and a cluster of our own has this machine only", where="launcher.nodes", fix="launcher.nodes=1"
        )
    if options.requeue == "chain":
        raise ConfigError("a Ray job restarts by itself and needs no chain", where="launcher.requeue", fix="launcher.requeue=requeue")
    for key in ("then", "container"):
        if getattr(options, key):
            raise ConfigError(
                "the Ray launcher does not know it", where=f"launcher.{key}", fix=f"leave launcher.{key} out, or launcher=slurm"
            )
    _check_resources(options)
    return OWN if options.address == OWN else ray_api.dashboard_address(options.address)


def _check_resources(options: LauncherConfig) -> None:
    if options.memory:
        _memory_bytes(options.memory)
    for name, value in options.resources.items():
        if name in _OWN_KEYS:
            raise ConfigError(f"{name} has a key of its own", where="launcher.resources", fix=f"{_OWN_KEYS[name]}=...")
        if value <= 0 or (value > 1 and value != int(value)):
            raise ConfigError(
                f"{value:g} of {name}: Ray gives out parts of one, or whole numbers", where="launcher.resources", fix=f"{{{name}:1}}"
            )


def _memory_bytes(text: str) -> int:
    found = _MEMORY.fullmatch(text.strip())
    size = int(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not size:
        raise ConfigError(
            f"'{text}' is no amount of memory that a Ray node could set aside", where="launcher.memory", fix="launcher.memory=64G"
        )
    return size


def check_room(api: RayApi, need: Wanted, options: LauncherConfig) -> None:
    """Checks that the cluster as it stands could hold the job, were it alone there.

    Raises:
        PreflightError: it could not, and how to shrink it.
    """
    nodes = api.nodes()
    least = need.on_nodes(options.elastic.min_nodes or need.nodes)
    found = ray_room.shortage(least, nodes)
    if found is not None:
        raise PreflightError(found.what, where=api.address, fix=found.fix or "add nodes to the cluster")
