"""The figures of a run over its steps, read once and held as plain arrays; a million steps fit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from factory_train.run_dir import RunDir
from factory_train.tracking.rows import last_valid_steps, read_chunks

Array = NDArray[np.float64]

# What a train row may say that a report shows; a row without a figure has NaN there.
FIGURES = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_seen",
    "tokens_per_s",
    "step_time_s",
    "data_s",
    "compute_s",
    "reduce_s",
    "optimizer_s",
    "ckpt_stall_s",
    "memory_bytes",
    "mfu",
    "skipped",
)
# The parts of a step, in the order in which they happen.
PHASES = ("data_s", "compute_s", "reduce_s", "optimizer_s")


@dataclass(frozen=True)
class Curves:
    """The merged rows of all attempts: what a later attempt repeated replaces the earlier rows.

    Args:
        steps: completed optimizer steps of each train row.
        figures: a value a train row and figure (see `FIGURES`); NaN where the row has none or it was not finite.
        validations, samples: those rows as they were written.
        starts: attempt number and the step it resumed from, for all attempts that began to train.
        spans: attempt number and the times of its first and last row, in seconds since the epoch, superseded rows included.
    """

    steps: Array
    figures: dict[str, Array]
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]) if len(self.steps) else 0

    @property
    def restarts(self) -> list[tuple[int, int]]:
        """Attempt number and step of every start but the first after which training went on."""
        return [start for start in self.starts[1:] if start[1] < self.last_step]

    def has(self, name: str) -> bool:
        """Returns whether any row has the figure."""
        return bool(np.isfinite(self.figures[name]).any())

    def last(self, name: str) -> float | None:
        """Returns the newest finite value of a figure."""
        found = self.finite(name)[1]
        return float(found[-1]) if len(found) else None

    def finite(self, name: str) -> tuple[Array, Array]:
        """Returns the steps and values of a figure where it has one."""
        values = self.figures[name]
        known = np.isfinite(values)
        return self.steps[known], values[known]

    def total(self, name: str) -> float:
        """Returns the sum of a figure over all steps."""
        return float(np.nansum(self.figures[name])) if len(self.steps) else 0.0

    def median(self, name: str) -> float | None:
        """Returns the middle value of a figure, None where no row has it."""
        return float(np.median(self.finite(name)[1])) if self.has(name) else None

    def tokens_at(self, steps: Any) -> Array:
        """Returns the tokens seen by then; only where `has("tokens_seen")`."""
        known, tokens = self.finite("tokens_seen")
        return np.interp(steps, np.concatenate(([0.0], known)), np.concatenate(([0.0], tokens)))


def read_curves(run: RunDir) -> Curves:
    """Reads metrics.jsonl of all attempts piece by piece; a torn line of a run that is being written is passed over."""
    limits = last_valid_steps(run)
    pieces: dict[str, list[Array]] = {name: [] for name in ("step", *FIGURES)}
    found: dict[str, list[dict[str, Any]]] = {"start": [], "train": [], "validation": [], "sample": []}
    starts: list[tuple[int, int]] = []
    spans: dict[int, tuple[float, float]] = {}
    for attempt in run.attempts():
        limit = limits[attempt.number]
        for chunk in read_chunks(attempt, 0):
            for row in chunk.rows:
                if row["kind"] in found and (row["step"] <= limit or row["kind"] == "start"):
                    found[row["kind"]].append(row)
            if chunk.rows:
                first = spans.get(attempt.number, (chunk.rows[0]["time"], 0.0))[0]
                spans[attempt.number] = (first, chunk.rows[-1]["time"])
            # Of the many rows only the figures stay in memory.
            for name, arrays in pieces.items():
                arrays.append(_column(found["train"], name))
            starts += [(attempt.number, int(row["step"])) for row in found["start"]]
            found["train"], found["start"] = [], []
    columns = {name: np.concatenate([np.zeros(0), *arrays]) for name, arrays in pieces.items()}
    return Curves(columns.pop("step"), columns, found["validation"], found["sample"], starts, spans)


def _column(rows: list[dict[str, Any]], name: str) -> Array:
    values = np.array([row.get(name) for row in rows], dtype=np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def smoothed(values: Any, half: int | None = None) -> list[float]:
    """Returns the mean over a window around each value, about a twentieth of the run wide; a trailing mean would lag behind.

    Where the window would reach beyond an end, the straight line through the last whole window stands in: a window
    that shrank to a single value would end the curve in a spike.

    Args:
        values: at even distances.
        half: values on either side that count.
    """
    y = np.asarray(values, dtype=np.float64)
    half = min(len(y) // 40, 500) if half is None else half
    width = 2 * half + 1
    if len(y) < width or half == 0:
        return [float(value) for value in y]
    sums = np.concatenate(([0.0], np.cumsum(y)))
    middle = (sums[width:] - sums[:-width]) / width
    return [float(value) for value in np.concatenate((_line(y[:width])[:half], middle, _line(y[-width:])[half + 1 :]))]


def _line(values: Array) -> Array:
    """Returns the least-squares straight line through values at even distances, at the same places."""
    places = np.arange(len(values)) - (len(values) - 1) / 2
    return values.mean() + places * (places @ values) / (places @ places)


def thinned(x: Array, y: Array, max_points: int = 1600) -> tuple[Array, Array]:
    """Returns at most about `max_points` of the points: of each stretch the lowest and the highest, so that no extreme is lost."""
    if len(x) <= max_points:
        return x, y
    edges = np.linspace(0, len(x), max_points // 2 + 1).astype(int)
    kept = {0, len(x) - 1}
    for start, end in itertools.pairwise(edges):
        piece = y[start:end]
        kept |= {start + int(piece.argmin()), start + int(piece.argmax())}
    places = np.array(sorted(kept))
    return x[places], y[places]


def bucket_means(x: Array, y: Array, edges: Array) -> Array:
    """Returns the mean of `y` between every two edges of `x`, values that are not there counting as zero."""
    places = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    sums = np.bincount(places, weights=np.nan_to_num(y), minlength=len(edges) - 1)
    counts = np.bincount(places, minlength=len(edges) - 1)
    return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
