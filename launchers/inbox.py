"""What reaches a supervisor from outside: signals, and the end of the process that submitted the job."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType

# Schedulers warn with SIGUSR2 or SIGTERM.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
# Ends everything at once, without the wait for a second Ctrl-C.
END_SIGNAL = signal.SIGQUIT


class Inbox:
    """Collects requests to stop; handlers only note the number, `wait` returns early when something happened."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._submitter: int | None = None
        # How many signals had come when the submitter went, or None while it is there.
        self._gone_after: int | None = None
        self._wake, wake_in = os.pipe()
        for fd in (self._wake, wake_in):
            os.set_blocking(fd, False)
        # Without this a signal that arrives between a look at `received` and select() would wait for the timeout.
        signal.set_wakeup_fd(wake_in, warn_on_full_buffer=False)
        for signum in (*STOP_SIGNALS, END_SIGNAL):
            signal.signal(signum, self._note)
        # The end of a child must interrupt the wait too, and it only does with a handler of our own.
        signal.signal(signal.SIGCHLD, _ignore)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)

    def watch_submitter(self, fd: int) -> None:
        """Takes the end of file on `fd` for the death of the process that holds its other end."""
        self._submitter = fd

    @property
    def stop(self) -> signal.Signals | None:
        """SIGINT or SIGTERM once somebody asked to save and stop; the first request decides which."""
        if self._gone_after == 0:
            return signal.SIGTERM
        return _kind(self.received[0]) if self.received else None

    @property
    def why(self) -> str:
        """What asked to stop."""
        return (
            "the process that submitted the job is gone" if self._gone_after == 0 else f"{signal.Signals(self.received[0]).name} received"
        )

    @property
    def at_once(self) -> signal.Signals | None:
        """SIGINT or SIGTERM once somebody asked a second time, or asked for an end at once."""
        if END_SIGNAL in self.received or len(self.received) >= 2:
            return _kind(self.received[-1])
        return None

    def wait(self, timeout_s: float) -> None:
        """Sleeps until a signal, the end of a child, the end of the submitter, or the timeout."""
        watched = [self._wake] if self._submitter is None else [self._wake, self._submitter]
        ready, _, _ = select.select(watched, [], [], max(0.0, timeout_s))
        if self._wake in ready:
            os.read(self._wake, 4096)
        if self._submitter in ready and not os.read(self._submitter, 4096):
            self._submitter = None
            self._gone_after = len(self.received)


def _kind(signum: int) -> signal.Signals:
    return signal.SIGINT if signum in (signal.SIGINT, END_SIGNAL) else signal.SIGTERM


def _ignore(signum: int, frame: FrameType | None) -> None:
    return None
