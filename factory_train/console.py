"""What a person sees while a run goes on: one live line on a terminal, key=value lines elsewhere."""

from __future__ import annotations

import os
import shutil
import sys
from collections import deque
from typing import Any, TextIO

from factory_train import errors, flight_recorder
from factory_train.run_dir import Attempt
from factory_train.tail import Follower
from factory_train.units import format_bytes, format_count, format_duration

# Over so many steps; one alone says little.
DATA_WAIT_STEPS = 20
# Less than this part of a step is not worth a person's attention.
DATA_WAIT_SHOWN = 0.1


class DataWait:
    """The part of the step time that waiting for data takes, over the last steps."""

    def __init__(self) -> None:
        self._rows: deque[tuple[float, float]] = deque(maxlen=DATA_WAIT_STEPS)

    def add(self, row: dict[str, Any]) -> None:
        """Counts a row of kind "train"; those of old runs have no breakdown and count as no wait."""
        if row.get("step_time_s"):
            self._rows.append((row.get("data_s") or 0.0, row["step_time_s"]))

    def significant(self) -> float | None:
        """Returns the part, if it is more than a person should put up with."""
        total = sum(step for _, step in self._rows)
        part = sum(wait for wait, _ in self._rows) / total if total else 0.0
        return part if part > DATA_WAIT_SHOWN else None


class ProgressView:
    """Follows an attempt through its files and shows what is new.

    Args:
        attempt: whose metrics and events are shown.
        stream: where to; a terminal gets a line that is rewritten in place.
    """

    def __init__(self, attempt: Attempt, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._attempt = attempt
        self._rows = Follower(attempt.metrics_path)
        self._events = Follower(attempt.events_path)
        cfg = attempt.config()
        self._steps, self._log_every = cfg.train.steps, cfg.train.log_every
        self._validation: dict[str, Any] | None = None
        self._data_wait = DataWait()
        self._live_text = ""

    def update(self) -> None:
        """Shows what the files gained since the last call."""
        for event in self._events.rows():
            self._show_event(event)
        for row in self._rows.rows():
            self._show_row(row)

    def close(self) -> None:
        """Leaves the live line behind and goes on below it."""
        if self._live_text:
            self._stream.write("\n")
            self._live_text = ""
        self._stream.flush()

    def _show_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in ("prepare", "finish"):
            self._print(f"{kind:<10}  {event['message']}")
        elif kind == "resume":
            self._print(f"{'resume':<10}  from step {event['step']} ({event['checkpoint']})")
        elif kind == "checkpoint-skipped":
            self._print(f"{'warning':<10}  checkpoint {event['message']}")
        elif kind == "checkpoint" and event.get("warning"):
            self._print(f"{'warning':<10}  checkpoint of step {event['step']}: {event['warning']}")
        elif kind == "checkpoint-failed":
            fix = f"; {event['fix']}" if event.get("fix") else ""
            self._print(f"{'warning':<10}  no checkpoint of step {event['step']}, training goes on: {event['message']}{fix}")
        elif kind == "diloco-epoch":
            self._print(f"{'islands':<10}  {event['message']}")
        elif kind == "init":
            self._print(f"{'init':<10}  {event['message']}")
        elif kind == "profile":
            self._print(f"{'profile':<10}  steps {event['first']} to {event['step']}: {self._attempt.path / event['table']}")
        elif kind == "profile-failed":
            self._print(f"{'warning':<10}  no profile: {event['message']}")
        elif kind == "host-sync":
            places = event["places"]
            more = f" and {len(places) - 1} more places (events.jsonl)" if len(places) > 1 else ""
            self._print(f"{'warning':<10}  the host waits for the card at {places[0]}{more}")

    def _show_row(self, row: dict[str, Any]) -> None:
        if row["kind"] == "validation":
            self._validation = row
            self._print(f"val step={row['step']} loss={_number(row['loss'])} bpb={_number(row['bits_per_byte'])}")
            return
        if row["kind"] == "train":
            self._data_wait.add(row)
        if row["kind"] == "train" and self._live:
            self._rewrite(self._live_line(row))
        elif row["kind"] == "train" and (row["step"] % self._log_every == 0 or row["step"] == self._steps):
            self._print(self._plain_line(row))

    def _plain_line(self, row: dict[str, Any]) -> str:
        parts = [
            f"step={row['step']}/{self._steps}",
            f"loss={_number(row['loss'])}",
            f"gnorm={_number(row['grad_norm'], 2)}",
            f"lr={row['lr']:.3g}",
            f"tok/s={format_count(row['tokens_per_s'])}",
            f"tflops={row['tflops_per_s']:.3g}",
            *([f"mfu={row['mfu']:.3f}"] if "mfu" in row else []),
            f"mem={format_bytes(row['memory_bytes'])}",
            f"eta={self._remaining(row)}",
            *([f"data_wait={wait:.0%}"] if (wait := self._data_wait.significant()) else []),
            *(["skipped=1"] if row["skipped"] else []),
        ]
        return " ".join(parts)

    def _live_line(self, row: dict[str, Any]) -> str:
        parts = [
            f"step {row['step']}/{self._steps}",
            f"loss {_number(row['loss'])}",
            f"{format_count(row['tokens_per_s'])} tok/s",
            f"MFU {row['mfu']:.1%}" if "mfu" in row else f"{row['tflops_per_s']:.3g} TFLOP/s",
            format_bytes(row["memory_bytes"]),
            f"ETA {self._remaining(row)}",
        ]
        if wait := self._data_wait.significant():
            parts.append(f"data wait {wait:.0%}")
        if self._validation:
            parts.append(f"val {_number(self._validation['loss'])}")
        return "  ".join(parts)

    def _remaining(self, row: dict[str, Any]) -> str:
        # Both are over the same window, so the step time is a mean and the estimate does not jump about.
        tokens_per_step = row["tokens_seen"] / row["step"]
        return format_duration((self._steps - row["step"]) * tokens_per_step / row["tokens_per_s"])

    def _rewrite(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        self._live_text = text[:width]
        # Back to the first column, then clear what a longer line left behind.
        self._stream.write(f"\r{self._live_text}\x1b[K")
        self._stream.flush()

    def _print(self, text: str) -> None:
        if self._live:
            self._stream.write(f"\r\x1b[K{text}\n{self._live_text}")
        else:
            self._stream.write(text + "\n")
        self._stream.flush()


def failure_lines(attempt: Attempt) -> list[str]:
    """Returns the first failure of an attempt for a person: which rank, what, what to change, where to read on."""
    error, verdict = attempt.error(), attempt.verdict()
    if error is None:
        return [f"error: {verdict.reason if verdict else 'the run ended without a verdict'}", f"  log: {attempt.path / 'logs'}"]
    stage = error.get("stage", "train")
    who = f"rank {error['rank']} on {error['host']}" if stage == "train" else f"{stage} stage on {error['host']}"
    lines = [f"error: {_what(error)}", f"  {'first failure' if stage == 'train' else 'in'}: {who}"]
    if (stuck := flight_recorder.explain(attempt)) is not None:
        lines.append(f"  collectives: {stuck}")
    if error.get("hint"):
        lines.append(f"  fix: {error['hint']}")
    name = f"rank-{error['rank']:05d}" if stage == "train" else stage
    return [*lines, f"  log: {attempt.run.path / error['log'] if error.get('log') else attempt.log_path(name)}"]


def _what(error: dict[str, Any]) -> str:
    """Returns the message; an error of Python's own needs its type to mean anything (KeyError: 'x')."""
    first, *rest = (error.get("message") or "").strip().splitlines() or [""]
    kind = error.get("type")
    is_ours = kind is None or hasattr(errors, kind)
    where = f"{error['where']}: " if error.get("where") else ""
    # The log has the rest of a message that goes on and on, as those of CUDA and NCCL do.
    return where + (first if is_ours else f"{kind}: {first}".removesuffix(": ")) + (" ..." if rest else "")


def _number(value: float | None, digits: int = 4) -> str:
    """Returns a figure, or nan for one that was not finite (null in the file)."""
    return "nan" if value is None else f"{value:.{digits}f}"
