"""Standing by a run: its progress on the terminal, its signals passed on, its verdict as the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from factory_train.commands.submission import Started
from factory_train.commands.summary import summary_lines
from factory_train.console import ProgressView, failure_lines
from factory_train.errors import ExitCode
from factory_train.run_dir import Attempt

_POLL_S = 0.2
_FORWARDED = (signal.SIGINT, signal.SIGTERM)


def follow(started: Started, received: Sequence[int]) -> int:
    """Shows progress until the run ends, then the result or the failure; returns the exit code of the verdict.

    Args:
        received: grows as signals arrive (`passing_on_signals`).
    """
    view = ProgressView(started.attempt)
    attempt = started.attempt
    passed_on, waits = 0, None
    while not started.handle.wait(_POLL_S):
        if (why := started.handle.waits_for()) not in (None, waits):
            waits = why
            print(f"{'waits':<10}  {why}", flush=True)
        if not attempt.is_newest():
            # The scheduler has started the job again.
            with ignoring_a_lost_reader():
                view.update()
                view.close()
            attempt = attempt.run.last_attempt() or attempt
            print(f"attempt {attempt.number}", flush=True)
            view = ProgressView(attempt)
        for signum in received[passed_on:]:
            started.handle.signal(signum)
            with ignoring_a_lost_reader():
                # The answer goes below the live line, not into it.
                view.close()
            print(_answer(signum, first=passed_on == 0), file=sys.stderr, flush=True)
            passed_on += 1
        with ignoring_a_lost_reader():
            view.update()
    with ignoring_a_lost_reader():
        view.update()
        view.close()
    return _conclude(started, attempt)


def _answer(signum: int, *, first: bool) -> str:
    name = signal.Signals(signum).name
    return f"{name}: saving, then stopping; once more ends the run at once" if first else f"{name}: ending at once"


def _conclude(started: Started, attempt: Attempt) -> int:
    verdict = attempt.verdict()
    if verdict is None:
        # Not even the verdict could be written: the disk is full or gone.
        print(f"error: the run ended without a verdict; see {attempt.launch}", file=sys.stderr)
        return started.handle.exit_code or ExitCode.FAILED
    if verdict.outcome == "done":
        print("\n".join(summary_lines(attempt)))
    elif verdict.exit_code in (ExitCode.INTERRUPTED, ExitCode.PREEMPTED):
        print(f"{verdict.outcome}: {verdict.reason}", file=sys.stderr)
        print(f"  to go on: python -m factory_train resume {attempt.run.name}", file=sys.stderr)
    else:
        print("\n".join(failure_lines(attempt)), file=sys.stderr)
    return verdict.exit_code


@contextlib.contextmanager
def passing_on_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of acting on them: the run decides what they mean.

    Enter it before the run is started: an interrupt must not fall between its start and the first look at it.
    """
    received: list[int] = []

    def note(signum: int, _: FrameType | None) -> None:
        received.append(signum)

    before = {signum: signal.signal(signum, note) for signum in _FORWARDED}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def ignoring_a_lost_reader() -> Iterator[None]:
    """A reader that leaves (`| head`) takes its view with it, not the run."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
