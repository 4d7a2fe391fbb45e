"""What keeps a worker from outliving its launcher, however the launcher ends."""

from __future__ import annotations

import os
import signal
import threading


def end_with_launcher(fd: int = 0) -> None:
    """Ends this process and all of its process group as soon as the launcher that started it is gone.

    A launcher holds the other end of the worker's stdin and never writes to it, so end-of-file means its death.
    """
    threading.Thread(target=_end_at_end_of_file, args=(fd,), name="lifeline", daemon=True).start()


def _end_at_end_of_file(fd: int) -> None:
    # Not sys.stdin: a thread inside its buffer makes the interpreter abort when it shuts down.
    while os.read(fd, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
