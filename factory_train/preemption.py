"""Stop requests: a signal sets a flag and nothing else; what happens next is agreed by all ranks."""

from __future__ import annotations

import signal
from types import FrameType


class StopSignal:
    """Remembers SIGTERM (preemption) and SIGINT (the person) for the training step to pass on.

    Install it before anything slow is imported: a signal during start-up must not be lost or become a traceback.
    """

    def __init__(self) -> None:
        self.preempt = False
        self.interrupt = False

    def install(self) -> None:
        """Takes over both signals; must run in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            self.interrupt = True
        else:
            self.preempt = True
