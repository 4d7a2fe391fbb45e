"""Switch files: what a person asks of a running job by making a file in its run directory, from any machine that sees it."""

from __future__ import annotations

import time
from pathlib import Path

from factory_train import storage
from factory_train.run_dir import RunDir

# Save and stop, as after Ctrl-C; nothing is requeued.
STOP = "stop"
# Save and stop, as after SIGTERM: whoever turned it on means to resume the run elsewhere. Only Ray jobs look at it.
PREEMPT = "preempt"
# Save and go on.
SAVE = "save"


def path(run: RunDir, name: str) -> Path:
    """Returns the file of a switch: `switches/stop` or `switches/save` in the run directory; `touch` is enough."""
    return run.path / "switches" / name


def turn_on(run: RunDir, name: str) -> None:
    """Makes the file."""
    storage.write_json(path(run, name), {"time": time.time()})


def turn_off(run: RunDir, name: str) -> None:
    """Removes the file, if it is there."""
    path(run, name).unlink(missing_ok=True)


def take(run: RunDir, name: str) -> bool:
    """Removes the file and returns whether it was there: one of several that look acts on it."""
    try:
        path(run, name).unlink()
    except FileNotFoundError:
        return False
    return True


def is_on(run: RunDir, name: str) -> bool:
    """Returns whether the file is there."""
    return path(run, name).exists()
