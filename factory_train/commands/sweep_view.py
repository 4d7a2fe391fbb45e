"""What a person sees while a sweep goes on: a line for each point that ends, one live line for what is running."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from factory_train.commands.follow import ignoring_a_lost_reader
from factory_train.commands.submission import Started
from factory_train.commands.summary import shown
from factory_train.commands.sweep_point import Draft
from factory_train.console import failure_lines
from factory_train.sweep import DONE, NOT_RUN, PENDING, SweepDir
from factory_train.sweep_report import cells, header, state_text
from factory_train.sweep_results import PointResult, SweepResults
from factory_train.tail import Follower
from factory_train.units import format_duration

# Where lines are not rewritten in place, one a minute shows that the sweep is alive.
_PLAIN_EVERY_S = 60.0
_LIVE_EVERY_S = 0.5


class SweepView:
    """Shows a sweep on stdout; a terminal gets a line that is rewritten in place.

    Args:
        sweep: whose points run.
        drafts: the points of this command, in order.
    """

    def __init__(self, sweep: SweepDir, drafts: Sequence[Draft]) -> None:
        self._sweep, self._drafts = sweep, drafts
        self._stream = sys.stdout
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._numbers = {draft.point.number: index for index, draft in enumerate(drafts, start=1)}
        self._running: dict[int, tuple[Follower, int]] = {}
        self._rows: dict[int, dict[str, Any]] = {}
        self._live_text = ""
        self._began, self._shown = time.monotonic(), time.monotonic()

    def begin(self, *, is_new: bool) -> None:
        """Shows what will run: the plan as far as it is the same for all points, and where it differs."""
        first = self._drafts[0].request
        together = min(first.config.launcher.sweep_parallel, len(self._drafts))
        self._print(f"{'launcher':<10}  {first.launcher_reason}")
        how = f"{len(self._drafts)} points, {together} at once" + ("" if is_new else "; goes on with what is not done")
        self._print(f"{'sweep':<10}  {self._sweep.name}   {shown(self._sweep.path)}   {how}")
        plans = [draft.request.plan.lines() for draft in self._drafts]
        common = [line for line in plans[0] if all(line in plan for plan in plans)]
        for line in common:
            self._print(line)
        for draft, plan in zip(self._drafts, plans, strict=True):
            own = [line for line in plan if line not in common]
            if own:
                self._print(self._head(draft, "plan"))
            for line in own:
                self._print(f"  {line}")

    def started(self, draft: Draft, started: Started) -> None:
        """A point runs now."""
        attempt = started.attempt
        self._running[draft.point.number] = (Follower(attempt.metrics_path), attempt.config().train.steps)
        again = f"   attempt {attempt.number}" if attempt.number > 1 else ""
        self._print(self._head(draft, "started") + again)

    def submitted(self, draft: Draft, started: Started) -> None:
        """A point is in a scheduler's queue."""
        self._print(self._head(draft, "submitted") + f"   job {started.handle.to_json()['job_id']}")

    def finished_before(self, draft: Draft) -> None:
        """A point needs no running: an earlier command has finished it."""
        self._print(self._head(draft, "done before"))

    def ended(self, draft: Draft, result: PointResult) -> None:
        """A point has ended, well or not."""
        self._running.pop(draft.point.number, None)
        self._rows.pop(draft.point.number, None)
        figures = f"   loss {result.loss:.4f}" if result.loss is not None else ""
        self._print(self._head(draft, result.state) + figures)
        run = self._sweep.run(draft.point)
        attempt = run.last_attempt() if run else None
        if result.state == DONE:
            return
        failed = attempt is not None and attempt.verdict() is not None and attempt.error() is not None
        lines = failure_lines(attempt) if attempt is not None and failed else [state_text(result)]
        self._clear()
        with ignoring_a_lost_reader():
            self._stream.flush()
        print("\n".join(f"  {line}" for line in lines), file=sys.stderr, flush=True)
        self._redraw()

    def signalled(self, signum: int, num_running: int, *, first: bool) -> None:
        """The command was asked to stop."""
        what = f"{num_running} running point{'' if num_running == 1 else 's'}"
        name = signal.Signals(signum).name
        self._clear()
        text = f"saving {what}, then stopping; once more ends them at once" if first else f"ending {what} at once"
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        self._redraw()

    def update(self) -> None:
        """Brings the line that shows what is running up to date."""
        for number, (follower, _) in self._running.items():
            for row in follower.rows():
                if row["kind"] == "train":
                    self._rows[number] = row
        now = time.monotonic()
        if now - self._shown < (_LIVE_EVERY_S if self._live else _PLAIN_EVERY_S):
            return
        self._shown = now
        if self._live:
            self._live_text = self._state_line()
            self._redraw()
        else:
            self._print(self._state_line())

    def close(self) -> None:
        """Takes the live line away."""
        self._clear()
        self._live_text = ""

    def _head(self, draft: Draft, state: str) -> str:
        label = f"   {draft.point.label}" if draft.point.label else ""
        return f"[{self._numbers[draft.point.number]}/{len(self._drafts)}] {state:<11} {draft.point.run}{label}"

    def _state_line(self) -> str:
        states = [draft.point.state for draft in self._drafts]
        done, waiting = states.count(DONE), states.count(NOT_RUN) + states.count(PENDING)
        counts = {
            "done": done,
            "running": len(self._running),
            "failed": len(states) - done - waiting - len(self._running),
            "waiting": waiting,
        }
        parts = [", ".join(f"{count} {state}" for state, count in counts.items() if count or state in ("done", "running"))]
        for number, (_, steps) in sorted(self._running.items()):
            row = self._rows.get(number)
            loss = row.get("loss") if row else None
            far = f"{row['step']}/{steps}" + (f" loss {loss:.3f}" if loss is not None else "") if row else "preparing"
            parts.append(f"#{self._numbers[number]} {far}")
        return f"sweep {format_duration(time.monotonic() - self._began)}: " + "  ".join(parts)

    def _print(self, text: str) -> None:
        self._clear()
        with ignoring_a_lost_reader():
            self._stream.write(f"{text}\n")
            self._stream.flush()
        self._redraw()

    def _clear(self) -> None:
        if self._live_text:
            with ignoring_a_lost_reader():
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def _redraw(self) -> None:
        if self._live_text:
            self._live_text = self._state_line()[: shutil.get_terminal_size().columns - 1]
            with ignoring_a_lost_reader():
                # Back to the first column, then clear what a longer line left behind.
                self._stream.write(f"\r{self._live_text}\x1b[K")
                self._stream.flush()


def table_lines(results: SweepResults) -> list[str]:
    """Returns the comparison as aligned lines for a terminal, the best first."""
    rows = [header(results), *cells(results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numbers = {rows[0].index(name) for name in ("loss", "bits/byte", "tok/s")}
    aligned = []
    for row in rows:
        parts = (
            text.rjust(width) if column in numbers else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        aligned.append("  ".join(parts).rstrip())
    return aligned
