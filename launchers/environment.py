"""What the environment of a job's processes must say so that they run this very package."""

from __future__ import annotations

import os
import socket
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import factory_train
from factory_train.launchers.job import WorkerEnv


def import_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns `environ` changed so that `python -m factory_train...` runs the package this process runs.

    That holds from any folder, uninstalled or installed: the folder above the package comes first, and the child does
    not put its working folder before it.
    """
    root = str(Path(factory_train.__file__).absolute().parent.parent)
    # site-packages ahead of the standard library would let backports there shadow it.
    first = [] if root in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) else [root]
    folder = os.getcwd()
    if "" in sys.path or folder in sys.path:
        # Plugins beside the user's command were importable here, so they are there.
        first.append(folder)
    inherited = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(first + inherited)), "PYTHONSAFEPATH": "1"}


def child_environ(environ: Mapping[str, str], extra: Mapping[str, str], worker: WorkerEnv, *, one_machine: bool) -> dict[str, str]:
    """Returns the environment of one worker process.

    Args:
        environ: what the launcher itself was given.
        extra: `JobSpec.environ`; it wins over `environ` and over the defaults set here.
        worker: wins over everything.
        one_machine: whether all ranks are here, so that they can talk over the loopback interface.
    """
    # A launcher that itself runs inside a job must not hand its own place on.
    inherited = {name: value for name, value in environ.items() if not WorkerEnv.owns(name)}
    defaults = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    loopback = _loopback() if one_machine else None
    if loopback is not None:
        # The name of a laptop or container often resolves to an address that nothing listens on.
        defaults["GLOO_SOCKET_IFNAME"] = loopback
    return {**defaults, **inherited, **extra, **worker.to_environ()}


def _loopback() -> str | None:
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)
