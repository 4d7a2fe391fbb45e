"""The process beside a rank that writes its checkpoints: `python -m factory_train.checkpoint.writer`. No torch.

It lives from the first save to the end of the rank and does one order at a time. Orders and answers are lines of JSON
over two pipes; the bytes to write are in an arena whose descriptor it inherits. When the rank ends, however it ends,
the orders reach their end and so does this process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from factory_train.checkpoint.arena import Arena
from factory_train.checkpoint.catalog import draft_path
from factory_train.checkpoint.commit import commit, open_draft
from factory_train.checkpoint.failure import describe, rebuild
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.part import Part, Piece, write_part
from factory_train.checkpoint.retention import Retention
from factory_train.errors import CheckpointError, FactoryTrainError
from factory_train.launchers.environment import import_environ
from factory_train.run_dir import Attempt, RunDir

# Training goes first: on a machine without spare cores the writer takes what is left over.
_NICENESS = 10
# Sent to all processes of a job by schedulers and terminals; what they mean is the rank's business.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_END_S = 5.0


@dataclass(frozen=True)
class Answer:
    """How an order went.

    Args:
        value: what it gave; empty when it failed.
        failure: what `failure.describe` says, or None.
        seconds: how long it took.
    """

    value: dict[str, Any]
    failure: dict[str, Any] | None
    seconds: float

    def error(self) -> FactoryTrainError | None:
        return rebuild(self.failure) if self.failure else None


class Writer(Protocol):
    """What carries out orders for the saver."""

    def order(self, order: Mapping[str, Any]) -> None:
        """Gives an order; there is none outstanding."""
        ...

    def answer(self, timeout_s: float | None) -> Answer | None:
        """Returns the answer to the outstanding order, waiting at most `timeout_s` for it (None: as long as it takes)."""
        ...

    def close(self) -> None:
        """Ends the writer; what it was writing stays unfinished."""
        ...


def write_order(attempt: Attempt, part: Part, *, rank: int) -> dict[str, Any]:
    """Returns the order to write a part from the arena; rank 0's also clears what earlier saves left unfinished."""
    return {"do": "write", **_who(attempt, rank), "part": part.to_json()}


def commit_order(attempt: Attempt, step: int, writers: list[str], retention: Retention) -> dict[str, Any]:
    """Returns the order to turn a draft that all writers have finished into a checkpoint."""
    return {"do": "commit", **_who(attempt, 0), "step": step, "writers": writers, "retention": retention.to_json()}


def _who(attempt: Attempt, rank: int) -> dict[str, Any]:
    return {"run_dir": str(attempt.run.path), "attempt": attempt.number, "rank": rank}


def carry_out(order: Mapping[str, Any], memory: memoryview, files: DurableFiles) -> Answer:
    """Does what an order says; errors become part of the answer."""
    began = time.monotonic()
    attempt, rank = Attempt(RunDir(Path(order["run_dir"])), order["attempt"]), order["rank"]
    doing = {"write": "writing a checkpoint", "commit": "committing a checkpoint"}[order["do"]]
    try:
        value, failure = _do(order, attempt, rank, memory, files), None
    except Exception as error:
        value, failure = {}, describe(error, doing, rank)
    return Answer(value, failure, time.monotonic() - began)


def _do(order: Mapping[str, Any], attempt: Attempt, rank: int, memory: memoryview, files: DurableFiles) -> dict[str, Any]:
    if order["do"] == "commit":
        return commit(attempt, order["step"], order["writers"], Retention(**order["retention"]), files).to_json()
    part = Part.from_json(order["part"])
    if rank == 0:
        open_draft(attempt, part.step, files)

    def read(piece: Piece) -> memoryview:
        return memory[piece.start : piece.start + piece.num_bytes]

    return {"num_bytes": write_part(draft_path(attempt, part.step), part, read, files)}


class WriterProcess:
    """A `Writer` in a process of its own.

    Args:
        arena: where the bytes of its orders are; it must not be closed before the process has ended.
        module: what is run (tests run one that stops at a given point).
    """

    def __init__(self, arena: Arena, module: str = "factory_train.checkpoint.writer") -> None:
        os.set_inheritable(arena.fd, True)
        self._received = b""
        # The process starts with these signals blocked, so that none is missed before it ignores them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(arena.fd), str(arena.size)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(arena.fd,),
                env=import_environ(os.environ),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    @property
    def pid(self) -> int:
        return self._process.pid

    def order(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        # A process that has died says so when its answer is asked for.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, timeout_s: float | None) -> Answer | None:
        output = self._process.stdout
        assert output is not None
        limit = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._received.endswith(b"\n"):
            wait_s = None if limit is None else max(0.0, limit - time.monotonic())
            if not select.select([output], [], [], wait_s)[0]:
                return None
            data = os.read(output.fileno(), 1 << 16)
            if not data:
                return self._died()
            self._received += data
        value, self._received = json.loads(self._received), b""
        return Answer(**value)

    def _died(self) -> Answer:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        error = CheckpointError(f"the process that writes checkpoints {how}", fix="its last words are in the log of its rank")
        return Answer({}, describe(error, "writing a checkpoint", 0), 0.0)

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(memory: memoryview, files: DurableFiles, orders: Callable[[], bytes], answers: Callable[[bytes], object]) -> None:
    """Carries out orders until there are no more."""
    while line := orders():
        answers(json.dumps(vars(carry_out(json.loads(line), memory, files))).encode() + b"\n")


def main(files: DurableFiles | None = None) -> None:
    """`python -m factory_train.checkpoint.writer ARENA_FD ARENA_BYTES`."""
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    with suppress(OSError):
        os.nice(_NICENESS)
    arena = Arena(int(sys.argv[1]), int(sys.argv[2]))
    # Whatever is printed by accident must not be taken for an answer.
    answers = os.dup(1)
    os.dup2(2, 1)
    serve(arena.view(), files or DurableFiles(), sys.stdin.buffer.readline, lambda line: os.write(answers, line))


if __name__ == "__main__":
    main()
