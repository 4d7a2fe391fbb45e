"""One process of a job: its start, its process group, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# What a process gets between SIGTERM and SIGKILL to tidy up.
TERM_S = 2.0
# Even SIGKILL waits for a process that sits in the kernel (a dead network mount); so long we wait with it.
KILL_S = 10.0


@dataclass
class Child:
    """A process in a process group of its own, with a log and a lifeline.

    Its stdin is a pipe that is never written: when the process that started it dies, however it dies, the child
    reads end-of-file there and ends itself.

    Args:
        name: name of its log, see `Attempt.log_path`.
        rank: its rank; 0 outside the train stage.
        log: where its stdout and stderr go.
        process: the process.
        ended_by_launcher: whether it was told to end from here, so that how it died means nothing.
        swept: whether what was left of its process group has been ended.
    """

    name: str
    rank: int
    log: Path
    process: subprocess.Popen[bytes]
    ended_by_launcher: bool = False
    swept: bool = False

    @staticmethod
    def start(
        name: str, rank: int, module: str, arguments: Iterable[str], environ: Mapping[str, str], log: Path, *, python: str = sys.executable
    ) -> Child:
        """Starts `python -m module arguments`.

        Raises:
            OSError: the log cannot be written or the process not be started.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [python, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environ,
                process_group=0,
            )
        return Child(name, rank, log, process)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        return self.process.poll()

    def signal(self, signum: int) -> None:
        """Sends a signal to the process alone; its own children may not know what to do with it."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signum)

    def signal_group(self, signum: int) -> None:
        """Sends a signal to the process and all it started."""
        # macOS answers EPERM, not ESRCH, for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signum)

    def sweep(self) -> None:
        """Ends what is left of its process group, once: later its number may belong to somebody else."""
        if not self.swept:
            self.signal_group(signal.SIGKILL)
            self.swept = True

    def death(self) -> str:
        """Returns how it ended, in words: "was killed by SIGKILL", "exited with code 3"."""
        code = self.process.returncode
        if code is None:
            return "could not be ended"
        return f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"


def signal_name(signum: int) -> str:
    """Returns "SIGTERM" for 15."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def end_all(children: Iterable[Child], *, gently: bool = False) -> None:
    """Ends the process groups of all children.

    Args:
        children: those that ended before lose what they left behind.
        gently: SIGTERM first. Not for ranks: they take it for the wish to save, and may say that they were preempted
            when in truth a peer of theirs has failed.
    """
    children = list(children)
    alive = [child for child in children if child.running]
    for child in alive:
        child.ended_by_launcher = True
    if gently:
        for child in alive:
            child.signal_group(signal.SIGTERM)
        deadline = time.monotonic() + TERM_S
        while any(child.running for child in alive) and time.monotonic() < deadline:
            time.sleep(0.01)
    for child in children:
        child.sweep()
    for child in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(KILL_S)
