"""metrics.jsonl of one attempt: the rows rank 0 writes while it trains."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from factory_train.run_dir import Attempt


class MetricsLog:
    """Appends rows of kind "start", "train", "validation" and "sample"; other ranks write nothing.

    Args:
        attempt: whose file it is.
        enabled: whether this rank is the one that writes.
    """

    def __init__(self, attempt: Attempt, *, enabled: bool) -> None:
        # Line-buffered, so that a row is there for readers as soon as it is written.
        self._file = open(attempt.metrics_path, "a", buffering=1) if enabled else None  # noqa: SIM115 (closed by close)

    def write(self, kind: str, step: int, **figures: Any) -> None:
        """Writes one row.

        Args:
            kind: what the row is about.
            step: completed optimizer steps.
            figures: values; a float that is not finite is written as null, which every JSON reader accepts.
        """
        if self._file is None:
            return
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in figures.items()}
        self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **row}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
