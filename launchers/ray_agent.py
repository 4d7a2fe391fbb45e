"""The part of a gang on one node: an actor that holds the node's share and runs its ranks as ordinary child processes.

Ranks are what they are under any launcher: own logs, signals, CUDA context. One actor a node costs one Ray worker, and
when it dies, however it dies, its ranks read the end of their standard input and end themselves.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from factory_train import storage
from factory_train.errors import ExitCode
from factory_train.launchers import autopsy
from factory_train.launchers.child import Child, end_all
from factory_train.launchers.environment import child_environ
from factory_train.launchers.fabric import fabric_environ
from factory_train.launchers.job import WorkerEnv
from factory_train.run_dir import Attempt, RunDir

# What machines get before they are taken away; ranks understand both.
_NOTICES = (signal.SIGTERM, signal.SIGUSR2)
_WELL = (ExitCode.OK, ExitCode.PREEMPTED, ExitCode.INTERRUPTED)


@dataclass(frozen=True)
class Exit:
    """How a process of a stage ended.

    Args:
        rank: whose it is.
        code: what the stage is to see: 0 for a rank that has done what it was asked to.
    """

    rank: int
    code: int


class NodeAgent:
    """Runs the processes of one node; all methods return at once.

    Args:
        run_dir, number: the attempt.
    """

    def __init__(self, run_dir: str, number: int) -> None:
        self._attempt = Attempt(RunDir.open(Path(run_dir)), number)
        self._spec: dict[str, Any] = storage.read_json(self._attempt.launch / "ray.json")
        self._stage = ""
        self._children: list[Child] = []
        self._told: list[int] = []
        # Ray's own answer to SIGTERM is to end; a notice to this process is one to its ranks.
        for signum in _NOTICES:
            signal.signal(signum, self._pass_on)

    def hello(self) -> dict[str, Any]:
        """Returns where this is: host, address, process, and the cards the node gives."""
        import ray

        context = ray.get_runtime_context()
        address = ray.util.get_node_ip_address()
        return {"host": socket.gethostname(), "address": address, "node_id": context.get_node_id(), "pid": os.getpid()}

    def start(self, stage: str, orders: Sequence[WorkerEnv]) -> None:
        """Starts a process for each of `orders`.

        Raises:
            OSError: a log cannot be written, or a process not be started.
        """
        self._stage, self._children, self._told = stage, [], []
        network = self._network() if stage == "train" else {}
        inherited = {**_node_caches(), **os.environ}
        # Ray's breakpoint() waits for a debugger that nobody attaches.
        inherited.pop("PYTHONBREAKPOINT", None)
        # A rank unblocks these signals when its handlers are in place: none is lost before, none ends it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_NOTICES, signal.SIGINT) if stage == "train" else ())
        try:
            for worker in orders:
                name = f"rank-{worker.rank:05d}" if stage == "train" else stage
                one_machine = worker.world_size == worker.local_world_size and not self._spec["meets_others"]
                environ = child_environ(inherited, {**network, **self._spec["environ"]}, worker, one_machine=one_machine)
                log = self._attempt.log_path(name)
                child = Child.start(name, worker.rank, self._spec["worker_module"], [stage], environ, log, python=self._spec["python"])
                self._children.append(child)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _network(self) -> dict[str, str]:
        found = fabric_environ(self._spec["fabric"], self._spec["interface"], self._attempt.path / "logs")
        if self._spec["meets_others"] and "GLOO_SOCKET_IFNAME" not in {**os.environ, **found}:
            import ray

            # The other islands are on other nodes: they reach this one where Ray does.
            name = _interface_of(ray.util.get_node_ip_address())
            found |= {"GLOO_SOCKET_IFNAME": name} if name else {}
        return found

    def poll(self) -> tuple[list[Exit], int, bool]:
        """Returns what has ended so far, how many still run, and whether a notice was passed on."""
        # One look at each: a child that ends meanwhile is reported next time, when what is to be said of its end has been written.
        ended = [child for child in self._children if not child.running]
        for child in ended:
            if not child.swept:
                child.sweep()
                self._note_end(child)
        exits = [Exit(child.rank, self._code(child)) for child in ended]
        return exits, len(self._children) - len(exits), bool(self._told)

    def signal(self, name: str) -> None:
        """Sends a signal to every rank."""
        self._pass_on(signal.Signals[f"SIG{name}"], None)

    def end(self) -> None:
        """Ends what still runs, without a word: a rank would take SIGTERM for the wish to save."""
        end_all(self._children)

    def _pass_on(self, signum: int, frame: FrameType | None) -> None:
        self._told.append(signum)
        for child in self._children:
            # Not `running`: it would collect the child in the middle of poll().
            if child.process.returncode is None:
                child.signal(signum)

    def _note_end(self, child: Child) -> None:
        code = child.process.returncode
        if code == 0 and child.rank == 0:
            (self._attempt.launch / f"{self._stage}.done").touch()
        if self._code(child) not in _WELL and not child.ended_by_launcher:
            autopsy.record(self._attempt, self._stage, child)

    def _code(self, child: Child) -> int:
        code = child.process.returncode
        if code == 0 or (self._stage == "train" and code in _WELL):
            return 0
        if self._told and (code in _WELL or -code in self._told):
            return int(ExitCode.PREEMPTED)
        return code if code > 0 else int(ExitCode.FAILED)


def _interface_of(address: str) -> str | None:
    """Returns the network interface that has an address; None when none has."""
    import psutil

    return next((name for name, found in psutil.net_if_addrs().items() if any(item.address == address for item in found)), None)


def _node_caches() -> dict[str, str]:
    """Returns where compiled kernels are kept: on the node's own disk, for a home on the network is slow and shared."""
    root = f"{tempfile.gettempdir()}/factory_train-cache-{os.getuid()}"
    return {"TRITON_CACHE_DIR": f"{root}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{root}/inductor"}
