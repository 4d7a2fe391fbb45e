"""What the checkpoint tests do again and again, in one process; what ranks do is in checkpoint_ranks.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_ranks as ranks

from factory_train.checkpoint.arena import Arena
from factory_train.checkpoint.saver import Saver
from factory_train.checkpoint.writer import WriterProcess
from factory_train.config import Config
from factory_train.run_dir import Attempt, RunDir


def new_run(folder: Path, name: str = "run") -> Attempt:
    return RunDir.create(folder, "test", name).new_attempt(Config(recipe="test"))


def next_attempt(attempt: Attempt) -> Attempt:
    return attempt.run.new_attempt(Config(recipe="test"))


def save(attempt: Attempt, step: int, *, seed: int | None = None, **kwargs: object) -> Path:
    """Saves `reference(seed)` (default: seed = step) from one process."""
    return attempt.run.checkpoints / ranks.save(0, 1, "single", attempt, step, step if seed is None else seed, **kwargs)


def history(folder: Path) -> Attempt:
    """Returns a run with checkpoints of steps 1 and 2."""
    attempt = new_run(folder)
    save(attempt, 1)
    save(attempt, 2)
    return attempt


def found(run: RunDir) -> tuple[int, list[str], list[str]]:
    """Returns the step that load finds, its notes, and what differs from what was saved then."""
    return ranks.load_notes(0, 1, "single", run)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


def tree(run: RunDir) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in sorted(run.checkpoints.rglob("*")) if path.is_file()}


def flip(path: Path, position: int) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


class Bench:
    """A saver of one rank with a real writer process, and a state to save.

    Args:
        module: what the writer process runs.
    """

    def __init__(self, attempt: Attempt, module: str = "factory_train.checkpoint.writer", **settings: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.writers: list[WriterProcess] = []

        def start(arena: Arena) -> WriterProcess:
            self.writers.append(WriterProcess(arena, module))
            return self.writers[-1]

        self.saver: Saver = ranks.make_saver(0, 1, attempt, start, events=self.events, **settings)

    def begin(self, step: int) -> None:
        """Begins to save `reference(step)`, and changes it as soon as that is allowed."""
        ranks.begin_beside(self.saver, "single", step)

    def save(self, step: int) -> None:
        self.begin(step)
        self.saver.finish()

    def kinds(self) -> list[tuple[str, int]]:
        return [(kind, facts["step"]) for kind, facts in self.events]
