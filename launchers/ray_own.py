"""A Ray cluster of our own on this machine: started by the first job that wants one, ended some time after the last.

Token authentication, the token in a file only its owner can read, the dashboard on the loopback address. A keeper
process (`python -m factory_train.launchers.ray_own FOLDER`) holds it, so that commands come and go.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from factory_train import storage
from factory_train.errors import FactoryTrainError, PolicyError, UnavailableError
from factory_train.hardware import num_cores
from factory_train.launchers import ray_api
from factory_train.launchers.environment import import_environ
from factory_train.launchers.ray_api import RayApi
from factory_train.run_dir import process_started_at

START_S = 90.0
# So long after its last job a cluster waits for the next.
IDLE_S = 60.0
_POLL_S = 0.2
# Nothing of ours goes through Ray's object store; it is as small as Ray allows to be sensible.
_OBJECT_STORE_BYTES = 100 * 2**20
_STOP_S = 15.0


@dataclass(frozen=True)
class OwnCluster:
    """A cluster of our own that runs.

    Args:
        address: of its dashboard.
        token_path: file with its token.
    """

    address: str
    token_path: str


def folder() -> Path:
    """Returns where the state of this user's cluster on this machine lies. Short, for sockets have short names.

    Raises:
        PolicyError: somebody else has made it.
    """
    path = Path(os.environ.get("FACTORY_TRAIN_RAY") or f"{tempfile.gettempdir()}/factory_train-ray-{os.getuid()}")
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PolicyError(
            "others have access to the folder of the cluster", where=str(path), fix=f"rm -r {path}, or FACTORY_TRAIN_RAY=FOLDER"
        )
    return path


def find() -> OwnCluster | None:
    """Returns the cluster that runs, if one does."""
    home = folder()
    known = storage.read_json(home / "cluster.json")
    if known is None or process_started_at(known["pid"]) != known["pid_started"]:
        return None
    return OwnCluster(known["address"], str(home / "token"))


def ensure() -> OwnCluster:
    """Returns the cluster, started if there is none.

    Raises:
        UnavailableError: it did not come up.
    """
    home = folder()
    with storage.locked(home / "lock"):
        (home / "used").touch()
        if (found := find()) is not None:
            return found
        storage.write_atomic(home / "token", secrets.token_hex(32).encode())
        (home / "token").chmod(0o600)
        (home / "cluster.json").unlink(missing_ok=True)
        with open(home / "keeper.log", "ab") as log:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "factory_train.launchers.ray_own", str(home)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=import_environ(os.environ),
                cwd=home,
                start_new_session=True,
            )
        limit, found = time.monotonic() + START_S, None
        try:
            while found is None and time.monotonic() < limit and keeper.poll() is None:
                time.sleep(_POLL_S)
                found = find()
            if found is not None:
                return found
        finally:
            if found is None:
                keeper.terminate()
    raise UnavailableError(
        "the Ray cluster of our own did not come up",
        where=str(home),
        fix=f"see {home}/keeper.log; pip install 'factory_train[ray]' has its dashboard",
    )


def start_command(home: Path, port: int) -> list[str]:
    """Returns what starts the head node, in the foreground.

    Ray opens its own folder to everybody, so it lies below one that is not.
    """
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(
            "--port=0",
            f"--ray-client-server-port={_free_port()}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={port}",
        ),
        *(f"--temp-dir={home}/ray", f"--num-cpus={num_cores()}", f"--object-store-memory={_OBJECT_STORE_BYTES}", "--disable-usage-stats"),
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]


def _environ(home: Path) -> dict[str, str]:
    # The cluster of somebody else must not be meant.
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_API_SERVER_ADDRESS")}
    return kept | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token"), "RAY_USAGE_STATS_ENABLED": "0"}


def _die_with_the_keeper() -> None:
    """Has the kernel end the head node when the keeper is killed."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Keeper:
    """Holds a cluster for as long as it has jobs, and a while longer.

    Args:
        home: `folder()`.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._asked = False
        self._address = f"http://127.0.0.1:{_free_port()}"
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._note)

    def _note(self, signum: int, frame: object) -> None:
        self._asked = True

    def run(self) -> int:
        """Starts the cluster and returns when it has ended; nothing of it is left then."""
        port = int(self._address.rpartition(":")[2])
        # Logs of the cluster before this one.
        shutil.rmtree(self._home / "ray", ignore_errors=True)
        head = subprocess.Popen(
            start_command(self._home, port),
            env=_environ(self._home),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_the_keeper,
        )
        try:
            while head.poll() is None and not self._asked:
                api = self._connect()
                if api is not None and not (self._home / "cluster.json").exists():
                    known = {"address": self._address, "pid": os.getpid(), "pid_started": process_started_at(os.getpid())}
                    storage.write_json(self._home / "cluster.json", known)
                if api is not None and self._is_over(api):
                    return 0
                time.sleep(1.0 if api else _POLL_S)
            return 0 if self._asked else 1
        finally:
            (self._home / "cluster.json").unlink(missing_ok=True)
            _end(head)

    def _connect(self) -> RayApi | None:
        """Returns the cluster once it takes jobs: its dashboard is up before its node is."""
        try:
            api = RayApi.connect(self._address, str(self._home / "token"))
            return api if api.nodes() else None
        except FactoryTrainError:
            return None

    def _is_over(self, api: RayApi) -> bool:
        """Returns whether nobody has wanted the cluster for a while; nobody finds it any more then."""
        if not self._is_idle(api):
            return False
        with storage.locked(self._home / "lock"):
            # Somebody may have come between the look and the lock.
            if not self._is_idle(api):
                return False
            (self._home / "cluster.json").unlink(missing_ok=True)
            return True

    def _is_idle(self, api: RayApi) -> bool:
        try:
            jobs = api.jobs()
        except FactoryTrainError:
            return False
        ends = [(job.get("end_time") or 0) / 1000 for job in jobs]
        last = max([(self._home / "used").stat().st_mtime, *ends])
        return all(job["status"] in ray_api.ENDED for job in jobs) and time.time() - last > IDLE_S


def _end(head: subprocess.Popen[bytes]) -> None:
    """Ends the head node and every process it has started."""
    import psutil

    try:
        processes = psutil.Process(head.pid).children(recursive=True)
    except psutil.Error:
        processes = []
    # It ends its own in the right order.
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(_STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(head.pid, signal.SIGKILL)
    for process in processes:
        # psutil knows a process by its start time too, so a number that was given out again is not meant.
        with contextlib.suppress(psutil.Error):
            process.kill()


def main() -> int:
    """`python -m factory_train.launchers.ray_own FOLDER`."""
    return Keeper(Path(sys.argv[1])).run()


if __name__ == "__main__":
    sys.exit(main())
