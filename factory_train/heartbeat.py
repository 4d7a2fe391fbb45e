"""Signs of life of the ranks: a file each, rewritten every few seconds, that says which step it is at and what it is doing.

Whoever looks can tell which rank stopped first, on any backend: collectives make all the others wait for it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from factory_train.run_dir import HEARTBEAT_EVERY_S, Attempt

# What a rank does within a step, in order, and after it. Who is in the reduction waits for the others.
PHASES = ("start", "data", "compute", "reduce", "update", "save", "validate")
_WIDTH = 96


@dataclass(frozen=True)
class Beat:
    """What a rank's file said.

    Args:
        rank: whose it is.
        age_s: seconds since it was written.
        step: completed optimizer steps; -1 before training.
        phase: one of `PHASES`, or "" where the file does not say.
        since: when this phase began, in seconds since the epoch.
    """

    rank: int
    age_s: float
    step: int
    phase: str
    since: float


class Place:
    """Where this process is; the training loop moves it, the heartbeat writes it down."""

    def __init__(self) -> None:
        self.now: tuple[int, str, float] = (-1, "start", time.time())

    def enter(self, step: int, phase: str) -> None:
        """Notes that `phase` of step `step` begins, or goes on. One assignment: it costs nothing."""
        if self.now[:2] != (step, phase):
            self.now = (step, phase, time.time())


def keep_beating(path: Path, place: Place, look: Callable[[], None]) -> None:
    """Rewrites a heartbeat file for as long as this process lives, and calls `look` each time."""

    def beat() -> None:
        while True:
            try:
                write(path, place)
                look()
            except OSError:
                # A full or vanished disk shows itself where it matters, in a save.
                pass
            time.sleep(HEARTBEAT_EVERY_S)

    threading.Thread(target=beat, name="heartbeat", daemon=True).start()


def write(path: Path, place: Place) -> None:
    """Writes one heartbeat, in place: readers see a line of the same length before and after."""
    path.parent.mkdir(exist_ok=True)
    step, phase, since = place.now
    line = json.dumps({"step": step, "phase": phase, "since": round(since, 3)}).ljust(_WIDTH - 1) + "\n"
    with open(path, "r+" if path.exists() else "w") as file:
        file.write(line)


def read_all(attempt: Attempt) -> list[Beat]:
    """Returns the heartbeats of all ranks that have written one, by rank."""
    folder = attempt.path / "heartbeat"
    beats = []
    for path in sorted(folder.glob("rank-*")) if folder.is_dir() else []:
        try:
            age_s = time.time() - path.stat().st_mtime
            text = path.read_text()
        except OSError:
            continue
        try:
            said = json.loads(text)
            beats.append(Beat(int(path.name[5:]), age_s, int(said["step"]), str(said["phase"]), float(said["since"])))
        except (ValueError, KeyError, TypeError):
            beats.append(Beat(int(path.name[5:]), age_s, -1, "", 0.0))
    return beats


def silent(beats: list[Beat], limit_s: float) -> Beat | None:
    """Returns the rank that has been silent longest, if it is beyond `limit_s` while another is not.

    When all are silent at once it is the filesystem, not the ranks.
    """
    if limit_s <= 0 or not beats:
        return None
    oldest = max(beats, key=lambda beat: beat.age_s)
    youngest = min(beat.age_s for beat in beats)
    return oldest if oldest.age_s > limit_s and youngest < limit_s / 2 else None


def furthest_behind(beats: list[Beat]) -> Beat | None:
    """Returns the rank that stopped first: silent, or at the earliest step and phase, or there for longest."""
    if not beats:
        return None
    youngest = min(beat.age_s for beat in beats)
    quiet = [beat for beat in beats if beat.age_s > youngest + 3 * HEARTBEAT_EVERY_S]
    if quiet:
        return max(quiet, key=lambda beat: beat.age_s)

    def place(beat: Beat) -> tuple[int, int, float]:
        return beat.step, PHASES.index(beat.phase) if beat.phase in PHASES else -1, beat.since

    return min(beats, key=place)
