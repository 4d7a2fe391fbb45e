"""A real Ray cluster of several nodes on this machine, and runs on it as a person starts and watches them."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import command
import pytest
from slurm_cluster import QUICK, text_file, until

from factory_train.launchers.ray_api import RayApi
from factory_train.run_dir import RunDir

_NEEDED = ("ray", "aiohttp_cors", "opencensus", "prometheus_client")
# A node's own store; nothing of a job goes through it.
_STORE_BYTES = 80 * 2**20
# Four ranks on two nodes, so small that a step takes a hundredth of a second.
GANG = ("recipe=llama_fsdp", "launcher=ray", "launcher.nodes=2", "launcher.tasks_per_node=2", "launcher.fabric=loopback")
# For commands that follow a run to its end, on a machine that is busy.
PATIENCE_S = 500.0


class Cluster:
    """Starts a head without room for ranks and `nodes` nodes with room for two each; ends them all.

    Args:
        folder: for the token.
        nodes: how many besides the head.
        cpus: of each.
        token: whether the cluster wants a token.
    """

    def __init__(self, folder: Path, *, nodes: int = 2, cpus: int = 2, token: bool = True) -> None:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"no {', '.join(missing)} here: pip install 'ray[default]'")
        self.token_path = folder / "token"
        self._num_nodes, self._cpus, self._wants_token = nodes, cpus, token
        self.nodes: list[Any] = []

    def __enter__(self) -> Cluster:
        self.token_path.write_text("t" * 64)
        self.token_path.chmod(0o600)
        os.environ |= {
            "RAY_AUTH_MODE": "token" if self._wants_token else "disabled",
            "RAY_AUTH_TOKEN_PATH": str(self.token_path),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        from ray._raylet import AuthenticationTokenLoader, Config
        from ray.cluster_utils import Cluster as RayCluster

        # Ray read them when it was imported, which may have been for another test.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

        # Every port any: another cluster may be on this machine.
        head = {
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,
        }
        self.ray = RayCluster(initialize_head=True, head_node_args=head | {"object_store_memory": _STORE_BYTES})
        self.address = f"http://{self.ray.head_node.webui_url}"
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        for _ in range(self._num_nodes):
            self.add_node()
        self.api = RayApi.connect(self.address)
        return self

    def __exit__(self, *_: object) -> None:
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        self.ray.shutdown()

    def add_node(self) -> None:
        # Cards only Ray believes in: it hands them out and names them to what runs there.
        self.nodes.append(self.ray.add_node(num_cpus=self._cpus, num_gpus=self._cpus, object_store_memory=_STORE_BYTES))

    def kill_node(self, node_id: str) -> None:
        """Ends a node as a machine ends that loses its power: nothing of it says goodbye."""
        node = next(node for node in self.nodes if node.node_id == node_id)
        self.nodes.remove(node)
        self.ray.remove_node(node, allow_graceful=False)

    def drain_node(self, node_id: str, seconds: int = 60) -> None:
        """Tells the cluster that a node will be taken away."""
        words = ("drain-node", "--address", self.ray.address, "--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION")
        more = ("--reason-message", "spot", "--deadline-remaining-seconds", str(seconds))
        done = subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words, *more], capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr


def submit(folder: Path, name: str, *words: str) -> RunDir:
    """Submits a run with this name and returns its directory; the command returns at once."""
    done = command.run(*GANG, f"run={name}", f"data.path={text_file(folder)}", *QUICK, *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs" / f"llama_fsdp-{name}")


def start_event(run: RunDir, attempt: int) -> dict[str, Any]:
    """Returns what an attempt said when it had its place."""
    return next(event for event in run.attempts()[attempt - 1].events() if event["event"] == "start")


def processes(run: RunDir, module: str) -> list[int]:
    """Returns the processes of a run that execute `python -m MODULE`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_text().split("\0")
            environ = (folder / "environ").read_text()
        except (OSError, ValueError):
            continue
        if arguments[1:3] == ["-m", module] and (str(run.path) in arguments or f"FACTORY_TRAIN_RUN_DIR={run.path}\0" in environ):
            found.append(int(folder.name))
    return found


def environ_of(pid: int) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def nothing_is_left(run: RunDir) -> None:
    """Waits until no process of a run is there any more."""
    modules = ("factory_train.worker", "factory_train.launchers.ray_driver", "factory_train.launchers.ray_entry")
    until(lambda: not any(processes(run, module) for module in modules), about=lambda: f"for the processes of {run.name}")
