"""`doctor` on Ray: the cluster that is named, its token, its version, its nodes, and what a cluster of our own needs."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator

from factory_train.commands.finding import NOTE, OK, PROBLEM, Finding
from factory_train.errors import FactoryTrainError
from factory_train.launchers import ray_api, ray_own
from factory_train.launchers.ray_api import RayApi
from factory_train.launchers.ray_room import NodeRoom

# Modules that `ray` alone does not bring and its dashboard, which takes jobs, needs.
_DASHBOARD = ("aiohttp", "aiohttp_cors", "opencensus", "prometheus_client")


def ray_cluster(address: str | None) -> Iterator[Finding]:
    """The cluster at `address`, else the one the environment names, else our own if it runs."""
    missing = [name for name in ("ray", *_DASHBOARD) if importlib.util.find_spec(name) is None]
    if missing:
        yield Finding(
            "ray here", NOTE, f"no {', '.join(missing)}: launcher.address=local cannot start a cluster", "pip install 'ray[default]'"
        )
    try:
        own = ray_own.find()
        if address == "local" or not (address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")):
            if own is None:
                yield Finding(
                    "ray", NOTE, "no cluster is named; launcher=ray launcher.address=local starts one here, RAY_ADDRESS names one"
                )
                return
            api = RayApi.connect(own.address, own.token_path)
        else:
            api = RayApi.connect(ray_api.dashboard_address(address))
    except FactoryTrainError as error:
        yield Finding("ray", PROBLEM, f"{error.where}: {error.what}", error.fix)
        return
    yield from _facts(api)


def _facts(api: RayApi) -> Iterator[Finding]:
    try:
        nodes, jobs = api.nodes(), api.jobs()
    except FactoryTrainError as error:
        yield Finding("ray", PROBLEM, f"{error.where}: {error.what}", error.fix)
        return
    running = sum(job["status"] not in ray_api.ENDED for job in jobs)
    yield Finding("ray", OK, f"{api.ray_version} at {api.address}, {running} of {len(jobs)} jobs running or waiting")
    try:
        api.check_version()
    except FactoryTrainError as error:
        yield Finding("ray version", PROBLEM, error.what, error.fix)
    if api.token is None:
        yield Finding("ray token", NOTE, ray_api.OPEN_WARNING.format(address=api.address))
    else:
        yield Finding("ray token", OK, "is wanted, and the one here is accepted")
    for text, count in sorted(Counter(_kind(node) for node in nodes).items()):
        yield Finding("ray nodes", OK, f"{count} with {text}")
    if not any(node.total.get("CPU", 0) >= 1 for node in nodes):
        yield Finding("ray nodes", PROBLEM, "no node has a core to give", "ray start --address=HEAD:6379 on each node")


def _kind(node: NodeRoom) -> str:
    cards = f" and {node.total['GPU']:g} GPU" if node.total.get("GPU") else ""
    cores = node.total.get("CPU", 0)
    return f"{cores:g} CPU{cards}" if cores else f"no CPU{cards} (a head that only directs)"
