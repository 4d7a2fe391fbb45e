"""How far a long read is: a line that is rewritten on a terminal, now and then a new one elsewhere."""

from __future__ import annotations

import sys
import threading
import time

from factory_train.units import format_bytes, format_duration

_EVERY_S = 0.1
_WIDTH = 24


class ProgressBar:
    """Counts bytes, from any thread, and shows them on stderr while the block runs.

    Args:
        label: what is being read.
        total: bytes in all.
        log_every_s: where there is no terminal, a line every so many seconds; None writes nothing there.
    """

    def __init__(self, label: str, total: int, *, log_every_s: float | None = None) -> None:
        self._label, self._total, self._done = label, max(1, total), 0
        self._began = time.monotonic()
        self._log_every_s = log_every_s
        self._lock = threading.Lock()
        self._live = sys.stderr.isatty()
        # On a terminal the first bytes show at once.
        self._shown = 0.0 if self._live else self._began

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def add(self, num_bytes: int) -> None:
        """Counts bytes that were read."""
        with self._lock:
            self._done += num_bytes
            now = time.monotonic()
            if self._live and now - self._shown >= _EVERY_S:
                self._shown = now
                sys.stderr.write(f"\r{self._line(now - self._began)}\x1b[K")
                sys.stderr.flush()
            elif not self._live and self._log_every_s is not None and now - self._shown >= self._log_every_s:
                self._shown = now
                print(self._line(now - self._began), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        part = min(1.0, self._done / self._total)
        speed = self._done / max(seconds, 1e-6)
        left = format_duration((self._total - self._done) / max(speed, 1.0))
        bar = f"[{'#' * round(part * _WIDTH):<{_WIDTH}}] {part:4.0%}"
        return f"{self._label}  {bar}  {format_bytes(self._done)} of {format_bytes(self._total)}  {format_bytes(speed)}/s  {left}"
