"""Parts for tests that run a supervisor or an agent in the test's own process."""

from __future__ import annotations

import time

from factory_train.launchers.child import Child


class Quiet:
    """An inbox that nothing comes into; a real one would take the signals of the tests for itself."""

    received: tuple[int, ...] = ()
    stop = at_once = None

    def wait(self, timeout_s: float) -> None:
        time.sleep(max(0.0, min(timeout_s, 0.05)))


def dies_after_a_look() -> property:
    """Returns a `Child.running` that is one look behind: each child is found dead right after it was seen alive."""
    seen: set[int] = set()

    def running(child: Child) -> bool:
        if child.process.poll() is None:
            return True
        first = child.process.pid not in seen
        seen.add(child.process.pid)
        return first

    return property(running)
