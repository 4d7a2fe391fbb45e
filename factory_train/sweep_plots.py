"""The plots of a sweep: final loss by point, loss against the values that vary, and all loss curves, as PNG files."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory_train import storage
from factory_train.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, STYLE, smoothed
from factory_train.sweep import DONE, SweepDir, shown_value, value_key
from factory_train.sweep_results import PointResult, SweepResults
from factory_train.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Files and their titles, in the order of the report.
PLOTS = {"values.png": "Loss against what varies", "final.png": "Final loss by point", "curves.png": "Loss while training"}
_COLORS = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_FIGURES = {"loss": "validation loss (nats/token)", "bits_per_byte": "validation bits per byte"}
# Values that span more than this are drawn on a logarithmic axis.
_WIDE = 8.0
# More names than this make a legend that hides the curves.
_MAX_NAMED = 12
_MAX_CURVE_POINTS = 2000
# Figures in more columns than this are written smaller.
_MAX_WIDE_CELLS = 7


def write_plots(sweep: SweepDir, results: SweepResults) -> list[Path]:
    """Draws what there is to draw into the sweep's folder of plots.

    Returns:
        The files written, in the order of `PLOTS`; plots of an earlier time that no longer apply are removed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context(STYLE):
        for name, draw in (("values.png", _draw_values), ("final.png", _draw_final), ("curves.png", _draw_curves)):
            # A figure of its own draws with Agg and leaves no global state behind, unlike pyplot.
            height = max(3.0, 1.6 + 0.32 * len(results.points)) if name == "final.png" else 4.8
            figure = Figure(figsize=(9, min(height, 40)), layout="constrained")
            if not draw(figure, sweep, results):
                (sweep.plots / name).unlink(missing_ok=True)
                continue
            image = io.BytesIO()
            figure.savefig(image, format="png")
            storage.write_atomic(sweep.plots / name, image.getvalue())
            written.append(sweep.plots / name)
    return written


def figure_of(results: SweepResults, result: PointResult) -> float | None:
    """Returns what the points are ranked by."""
    value: float | None = getattr(result, results.ranked_by)
    return value


def _draw_final(figure: Figure, sweep: SweepDir, results: SweepResults) -> bool:
    values = [figure_of(results, result) for result in results.points]
    found = [value for value in values if value is not None]
    if not found:
        return False
    axes = figure.add_subplot()
    low, high = min(found), max(found)
    margin = 0.08 * (high - low) or 0.05 * abs(low) or 0.1
    for row, (result, value) in enumerate(zip(results.points, values, strict=True)):
        if value is None:
            axes.text(low - margin, row, f" {result.state}", color=RED, va="center", fontweight="bold")
            continue
        color = GREEN if result is results.best else BLUE
        axes.plot([low - margin, value], [row, row], color=color, linewidth=1.5, alpha=0.5)
        axes.plot(
            [value], [row], color=color, marker="*" if result is results.best else "o", markersize=12 if result is results.best else 7
        )
        axes.annotate(f"{value:.4f}", (value, row), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(results.points)), [_name(result) for result in results.points], fontsize=9)
    axes.set_ylim(len(results.points) - 0.5, -0.5)
    axes.set_xlim(low - margin, high + 2.5 * margin)
    axes.set_xlabel(_FIGURES[results.ranked_by])
    axes.set_title(f"{sweep.name}: final loss by point, the best first")
    return True


def _draw_values(figure: Figure, sweep: SweepDir, results: SweepResults) -> bool:
    numeric = sweep.record().numeric_axes()
    if not numeric or not any(figure_of(results, result) is not None for result in results.points):
        return False
    axes = figure.add_subplot()
    if len(numeric) == 2 and len(results.axes) == 2:
        _draw_grid(figure, axes, results, numeric)
    else:
        _draw_lines(axes, results, numeric[0])
    axes.set_title(f"{sweep.name}: {_FIGURES[results.ranked_by]}")
    return True


def _draw_grid(figure: Figure, axes: Axes, results: SweepResults, numeric: Sequence[str]) -> None:
    """Two numbers vary: one cell a point, with its figure, or how it ended where there is none."""
    columns, rows = (sorted({result.point.values[axis] for result in results.points}) for axis in numeric)
    cells = [[math.nan] * len(columns) for _ in rows]
    best = results.best
    for result in results.points:
        x, y = columns.index(result.point.values[numeric[0]]), rows.index(result.point.values[numeric[1]])
        value = figure_of(results, result)
        cells[y][x] = math.nan if value is None else value
        text = result.state if value is None else f"{value:.4f}" + (" *" if result is best else "")
        style: dict[str, Any] = (
            {"color": RED} if value is None else {"color": "black", "fontweight": "bold" if result is best else "normal"}
        )
        axes.text(x, y, text, ha="center", va="center", fontsize=11 if len(columns) <= _MAX_WIDE_CELLS else 7, **style)
    # Pale enough at both ends for black figures on it.
    image = axes.imshow(cells, cmap="YlGnBu_r", aspect="auto", origin="lower", alpha=0.55)
    figure.colorbar(image, ax=axes, label=f"{_FIGURES[results.ranked_by]}; * is the best")
    axes.set_xticks(range(len(columns)), [shown_value(value) for value in columns])
    axes.set_yticks(range(len(rows)), [shown_value(value) for value in rows])
    axes.set_xlabel(numeric[0])
    axes.set_ylabel(numeric[1])
    axes.grid(False)


def _draw_lines(axes: Axes, results: SweepResults, numeric: str) -> None:
    """One number along the axis; one line for each combination of everything else that varies."""
    others = [axis for axis in results.axes if axis != numeric]
    groups: dict[Any, list[PointResult]] = {}
    for result in sorted(results.points, key=lambda result: result.point.values[numeric]):
        groups.setdefault(tuple(value_key(result.point.values.get(axis)) for axis in others), []).append(result)
    found = [value for result in results.points if (value := figure_of(results, result)) is not None]
    bottom = min(found)
    named = len(groups) <= _MAX_NAMED
    for (key, members), color in zip(groups.items(), itertools.cycle(_COLORS), strict=False):
        label = " ".join(f"{axis}={shown_value(value)}" for axis, value in zip(others, key, strict=True))
        done = [(result.point.values[numeric], value) for result in members if (value := figure_of(results, result)) is not None]
        if done:
            axes.plot(*zip(*done, strict=True), color=color, marker="o", linewidth=1.8, label=label if named and label else None)
    missing = [result.point.values[numeric] for result in results.points if figure_of(results, result) is None]
    if missing:
        axes.plot(
            missing, [bottom] * len(missing), color=RED, marker="x", markersize=9, markeredgewidth=2, linestyle="none", label="no result"
        )
    best = results.best
    if best is not None and (value := figure_of(results, best)) is not None:
        axes.plot([best.point.values[numeric]], [value], color=GREEN, marker="*", markersize=15, linestyle="none", label="best")
    values = [result.point.values[numeric] for result in results.points]
    if min(values) > 0 and max(values) / min(values) > _WIDE:
        axes.set_xscale("log")
    ticks = sorted(set(values))
    if len(ticks) <= _MAX_NAMED:
        axes.set_xticks(ticks, [shown_value(value) for value in ticks])
        axes.set_xticks([], minor=True)
    axes.set_xlabel(numeric)
    axes.set_ylabel(_FIGURES[results.ranked_by])
    axes.legend(loc="best", fontsize=9)


def _draw_curves(figure: Figure, sweep: SweepDir, results: SweepResults) -> bool:
    axes = figure.add_subplot()
    named, drawn = len(results.points) <= _MAX_NAMED, []
    for result, color in zip(results.points, itertools.cycle(_COLORS), strict=False):
        run = sweep.run(result.point)
        rows = [row for row in run.metrics() if row["kind"] == "train" and _is_finite(row.get("loss"))] if run else []
        if not rows:
            continue
        tokens, losses = [row["tokens_seen"] for row in rows], smoothed([row["loss"] for row in rows])
        stride = len(rows) // _MAX_CURVE_POINTS + 1
        best, unfinished = result is results.best, result.state != DONE
        label = _name(result) + (f" ({result.state})" if unfinished else " (best)" if best else "")
        axes.plot(
            tokens[::stride],
            losses[::stride],
            color=color,
            linewidth=2.6 if best else 1.4,
            linestyle=":" if unfinished else "-" if results.points.index(result) < len(_COLORS) else "--",
            label=label if named or best else None,
        )
        if unfinished:
            axes.plot(tokens[-1:], losses[-1:], color=color, marker="x", markersize=9, markeredgewidth=2)
        drawn.append(losses)
    if not drawn:
        return False
    # The first steps are the same fall for all, and points that blew up must not flatten the others.
    ends = sorted(losses[-1] for losses in drawn)
    middle = ends[len(ends) // 2]
    starts = max(losses[0] for losses in drawn)
    low = min(min(losses) for losses in drawn)
    axes.set_ylim(low - 0.05 * (starts - low or 1.0), min(starts, max(3 * middle, middle + 1.0)) * 1.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_tokens)
    axes.set_xlabel("tokens seen")
    axes.set_ylabel("training loss, smoothed (nats/token)")
    axes.set_title(f"{sweep.name}: loss while training")
    axes.legend(loc="best", fontsize=9)
    return True


def _tokens(value: float, _position: float) -> str:
    return format_count(value)


def _name(result: PointResult) -> str:
    return result.point.label or result.point.run


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
