"""Reading metrics.jsonl piece by piece, and what its rows are called in MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from factory_train.run_dir import Attempt, RunDir
from factory_train.tail import first_row

# Bounds the memory of a replay; about ten thousand rows.
CHUNK_BYTES = 4 << 20

TRAIN_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "tokens_seen": "train/tokens_seen",
    "skipped": "train/skipped_steps",
    "lr": "optim/lr",
    "tokens_per_s": "perf/tokens_per_s",
    "step_time_s": "perf/step_time_s",
    "tflops_per_s": "perf/tflops_per_s",
    "mfu": "perf/mfu",
    "memory_bytes": "mem/bytes",
    "ckpt_stall_s": "perf/ckpt_stall_s",
    # Where the time of a step goes.
    "data_s": "step/data_s",
    "compute_s": "step/compute_s",
    "reduce_s": "step/reduce_s",
    "optimizer_s": "step/optimizer_s",
}
VALIDATION_NAMES = {"loss": "validation/loss", "bits_per_byte": "validation/bits_per_byte"}
_NAMES = {"train": TRAIN_NAMES, "validation": VALIDATION_NAMES}


@dataclass(frozen=True)
class Value:
    """One point of a curve: MLflow's name, finite value, optimizer step, milliseconds since the epoch."""

    name: str
    value: float
    step: int
    time_ms: int


@dataclass(frozen=True)
class Chunk:
    """New rows of one attempt's file and the byte offset behind them."""

    rows: list[dict[str, Any]]
    end: int


def last_valid_steps(run: RunDir) -> dict[int, float]:
    """Returns, for each attempt, the last step whose rows still count.

    A later attempt's first row says where it resumed: what earlier attempts did beyond that step was lost with them.
    """
    limits: dict[int, float] = {}
    limit = math.inf
    for attempt in reversed(run.attempts()):
        limits[attempt.number] = limit
        first = first_row(attempt.metrics_path)
        if first is not None and first.get("kind") == "start":
            limit = min(limit, first["step"])
    return limits


def read_chunks(attempt: Attempt, start: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yields the complete rows from byte `start` on; a line that is not JSON (a crash cut it short) is passed over."""
    try:
        file = open(attempt.metrics_path, "rb")  # noqa: SIM115 (closed by the with below; only opening may fail quietly)
    except FileNotFoundError:
        return
    with file:
        size = file.seek(0, 2)
        # A file shorter than what was sent from it is another file: somebody restored the run from a copy.
        position = start if start <= size else 0
        while True:
            file.seek(position)
            data = file.read(chunk_bytes)
            complete, newline, _ = data.rpartition(b"\n")
            if not newline:
                return
            position += len(complete) + 1
            yield Chunk([row for line in complete.splitlines() if (row := _parse(line)) is not None], position)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"kind", "step", "time"} <= row.keys() else None


def values_of(row: dict[str, Any]) -> Iterator[Value | None]:
    """Yields the points of one row; None stands for a number that is not finite, which SQL stores would falsify."""
    for key, name in _NAMES.get(row["kind"], {}).items():
        if key in row:
            yield finite_value(name, row[key], row["step"], row["time"])


def finite_value(name: str, value: Any, step: int, time_s: float) -> Value | None:
    """Returns a point of a curve, or None when `value` is not a finite number."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return Value(name, float(value), int(step), int(time_s * 1000))


def sample_rows(run: RunDir) -> list[dict[str, Any]]:
    """Returns the text samples that still count, in order."""
    limits, samples = last_valid_steps(run), []
    for attempt in run.attempts():
        for chunk in read_chunks(attempt, 0):
            samples += [row for row in chunk.rows if row["kind"] == "sample" and row["step"] <= limits[attempt.number]]
    return samples


def evaluation_values(evaluation: dict[str, Any]) -> Iterator[Value | None]:
    """Yields the points of one evaluation/step-*.json; None stands for a number that is not finite."""
    figures = {name: evaluation.get(name) for name in ("loss", "bits_per_byte")}
    figures |= {f"baseline_{name}": loss for name, loss in (evaluation.get("baselines") or {}).items()}
    for name, value in figures.items():
        yield finite_value(f"evaluation/{name}", value, evaluation["step"], evaluation["time"])
