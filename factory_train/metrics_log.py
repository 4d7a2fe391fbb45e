"""What rank 0 writes while it trains: metrics.jsonl and events.jsonl of one attempt."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from factory_train.run_dir import Attempt
from factory_train.storage import JsonLinesFile


class MetricsLog:
    """Appends rows of kind "start", "train", "validation" and "sample", and events; other ranks write nothing.

    A disk that is full for a while ends nothing: what was held back follows when there is room again.

    Args:
        attempt: whose files they are.
        enabled: whether this rank is the one that writes.
    """

    def __init__(self, attempt: Attempt, *, enabled: bool) -> None:
        self._rows = JsonLinesFile(attempt.metrics_path) if enabled else None
        self._events = JsonLinesFile(attempt.events_path) if enabled else None
        # Told of every row that is written, as (kind, step, figures).
        self.mirror: Callable[[str, int, dict[str, Any]], None] | None = None

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Writes one row.

        Args:
            kind: what the row is about.
            step: completed optimizer steps.
            figures: values; a float that is not finite is written as null, which every JSON reader accepts.
        """
        if self._rows is not None:
            row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}
            self._rows.append({"kind": kind, "step": step, "time": time.time(), **row})
            if self.mirror is not None:
                self.mirror(kind, step, figures)

    def record_event(self, kind: str, **facts: Any) -> None:
        """Writes one event, as `Attempt.record_event` does."""
        if self._events is not None:
            self._events.append({"time": time.time(), "event": kind, **facts})

    def close(self) -> None:
        for file in (self._rows, self._events):
            if file is not None:
                file.close()
