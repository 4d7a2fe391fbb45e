"""The sign of life of the process that looks after a job, in every stage, for readers on other machines."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt

_LAUNCHER = "launcher"


def path_of(attempt: Attempt, name: str = _LAUNCHER) -> Path:
    """Returns the file that is touched."""
    return attempt.path / "heartbeat" / name


class Pulse:
    """Touches the heartbeat of an attempt's launcher.

    Args:
        attempt: whose heartbeat it is.
        name: of the process, where an attempt has several.
    """

    def __init__(self, attempt: Attempt, name: str = _LAUNCHER) -> None:
        self._path = path_of(attempt, name)
        self._last = 0.0

    def beat(self) -> None:
        """Touches the file if it is time to; call it as often as you like."""
        if time.monotonic() - self._last >= HEARTBEAT_EVERY_S:
            self._last = time.monotonic()
            try:
                self._path.touch()
            except OSError as error:
                # The log of this process may be on the same full disk.
                with contextlib.suppress(OSError):
                    os.write(2, f"no heartbeat: {error}\n".encode())
