"""What a launcher can say about a rank that died without a word."""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from typing import Any

from factory_train import storage, tail
from factory_train.launchers.child import Child
from factory_train.run_dir import Attempt

_LOG_LINES = 8
# Deaths that come from outside or from the hardware: never the consequence of another rank's failure.
_ROOT_CAUSES = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_HINTS = {
    signal.SIGKILL: "out of memory? lower train.micro_batch_size or launcher.tasks_per_node; the kernel's log (dmesg) names what it killed",
    signal.SIGBUS: "shared memory or the disk below a memory-mapped file is full",
    signal.SIGSEGV: "native code crashed; the end of the log shows where each thread was",
    signal.SIGABRT: "native code gave up; the end of the log says why",
}


def record(attempt: Attempt, stage: str, child: Child) -> None:
    """Writes ERROR.json about a child that failed, unless the failure is on record already.

    A rank that lost its peer may have been quicker to report that than this process was to see the peer die; then
    the death is put in its place, being the cause.
    """
    if attempt.verdict() is not None:
        return
    code = child.process.returncode
    known = attempt.error()
    if known is not None and not (-code in _ROOT_CAUSES and known.get("rank") != child.rank):
        return
    signum = signal.Signals(-code) if -code in set(signal.Signals) else None
    message = child.death().removeprefix("was ") if code < 0 else f"{child.death()} and left no message"
    error = _error(attempt, stage, child, message, _HINTS.get(signum) if signum else None)
    error |= {"exit_code": code, "signal": signum.name if signum else None, "followed_by": known}
    with contextlib.suppress(OSError):
        if known is None:
            attempt.record_error(error)
        else:
            storage.write_json(attempt.error_path, error)


def record_hung(attempt: Attempt, stage: str, child: Child, reason: str) -> None:
    """Writes ERROR.json about a child that had to be ended because it did not end by itself."""
    with contextlib.suppress(OSError):
        attempt.record_error(_error(attempt, stage, child, reason, None))


def last_step(attempt: Attempt) -> int | None:
    """Returns the last optimizer step the attempt's metrics tell of."""
    with contextlib.suppress(OSError, ValueError):
        for row in tail.rows_backwards(attempt.metrics_path):
            return int(row["step"])
    return None


def _error(attempt: Attempt, stage: str, child: Child, message: str, hint: str | None) -> dict[str, Any]:
    return {
        "time": time.time(),
        "stage": stage,
        "rank": child.rank,
        "host": socket.gethostname(),
        "message": message,
        "hint": hint,
        "traceback": None,
        "log": str(child.log.relative_to(attempt.run.path)),
        "log_tail": tail.last_lines(child.log, _LOG_LINES),
    }
