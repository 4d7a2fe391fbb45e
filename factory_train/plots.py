"""The plots of a report: loss, throughput, learning rate, as PNG files."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory_train import storage
from factory_train.tracking.facts import RunFacts
from factory_train.tracking.lineage import baseline_label
from factory_train.units import format_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

# Colours that people with any common colour blindness tell apart (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
_STYLE = {
    "figure.dpi": 130,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
}
# More points than a plot has pixels only cost time.
_MAX_POINTS = 4000


def write_plots(facts: RunFacts, rows: Rows, folder: Path) -> list[Path]:
    """Draws what there is to draw.

    Args:
        facts: of the run.
        rows: its merged metric rows.
        folder: where loss.png, throughput.png and lr.png go.

    Returns:
        The files written; none before the first step.
    """
    steps = [row for row in rows if row["kind"] == "train"]
    if not steps:
        return []
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context(_STYLE):
        for name, draw in (("loss.png", _draw_loss), ("throughput.png", _draw_throughput), ("lr.png", _draw_lr)):
            # A figure of its own draws with Agg and leaves no global state behind, unlike pyplot.
            figure = Figure(figsize=(9, 4.6), layout="constrained")
            draw(figure, facts, rows, steps)
            image = io.BytesIO()
            figure.savefig(image, format="png")
            storage.write_atomic(folder / name, image.getvalue())
            written.append(folder / name)
    return written


def _draw_loss(figure: Figure, facts: RunFacts, rows: Rows, steps: Rows) -> None:
    axes = figure.add_subplot()
    x, y = _series(steps, "loss")
    axes.plot(*_thinned(x, y), color=BLUE, alpha=0.25, linewidth=1, label="training, each step")
    axes.plot(*_thinned(x, smoothed(y)), color=BLUE, linewidth=2, label="training, smoothed")
    validation_x, validation_y = _series([row for row in rows if row["kind"] == "validation"], "loss")
    if validation_x:
        axes.plot(validation_x, validation_y, color=ORANGE, marker="o", markersize=5, linewidth=1.5, label="validation")
    for (name, loss), color in zip(sorted(facts.baselines.items()), (RED, GREEN, PURPLE, GREY), strict=False):
        axes.axhline(loss, color=color, linestyle="--", linewidth=1.3, label=f"{baseline_label(name)} baseline ({loss:.2f})")
    if facts.evaluation and math.isfinite(facts.evaluation["loss"]):
        axes.plot(
            [facts.evaluation["step"]],
            [facts.evaluation["loss"]],
            color=RED,
            marker="*",
            markersize=13,
            linestyle="none",
            label=f"evaluation ({facts.evaluation['loss']:.3f})",
        )
    axes.set_ylabel("loss (nats/token)")
    axes.set_title(f"{facts.run.name}: loss")
    _frame_values(axes, [*smoothed(y), *validation_y, *facts.baselines.values()])
    _finish(axes, steps)


def _draw_throughput(figure: Figure, facts: RunFacts, rows: Rows, steps: Rows) -> None:
    axes = figure.add_subplot()
    x, y = _series(steps, "tokens_per_s")
    axes.plot(*_thinned(x, y), color=GREEN, alpha=0.3, linewidth=1, label="each step")
    axes.plot(*_thinned(x, smoothed(y)), color=GREEN, linewidth=2, label="smoothed")
    if y:
        median = sorted(y)[len(y) // 2]
        axes.axhline(median, color=GREY, linestyle=":", linewidth=1.3, label=f"median ({format_count(median)})")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_formatter())
    axes.set_ylabel("tokens/s, all ranks")
    axes.set_title(f"{facts.run.name}: throughput")
    _finish(axes, steps)


def _draw_lr(figure: Figure, facts: RunFacts, rows: Rows, steps: Rows) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1))
    top.plot(*_thinned(*_series(steps, "lr")), color=PURPLE, linewidth=2, label=f"learning rate ({facts.config.optim.schedule})")
    top.set_ylim(bottom=0)
    top.yaxis.set_major_formatter(_plain)
    top.set_ylabel("learning rate")
    top.set_title(f"{facts.run.name}: learning rate and gradient norm")
    top.legend(loc="best")
    x, y = _series(steps, "grad_norm")
    bottom.plot(*_thinned(x, y), color=BLUE, linewidth=1, alpha=0.8, label="gradient norm before clipping")
    if facts.config.optim.max_grad_norm and y:
        limit = facts.config.optim.max_grad_norm
        bottom.axhline(limit, color=RED, linestyle="--", linewidth=1.3, label=f"clipped to {limit:g}")
    if y and min(y) > 0:
        bottom.set_yscale("log")
        bottom.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bottom.yaxis.set_major_formatter(_plain)
        bottom.yaxis.set_minor_formatter(NullFormatter())
    bottom.set_ylabel("gradient norm")
    _finish(bottom, steps, of_top=top)


def _series(rows: Rows, key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], float(row[key])) for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])]
    return [step for step, _ in found], [value for _, value in found]


def smoothed(values: list[float]) -> list[float]:
    """Returns the mean over a window around each value, about a fortieth of the run wide; a trailing mean would lag behind.

    Where the window would reach beyond an end, the straight line through the last whole window stands in: a window
    that shrank to a single value would end the curve in a spike.
    """
    half = min(len(values) // 80, 50)
    width = 2 * half + 1
    sums = [0.0, *itertools.accumulate(values)]
    middle = [(sums[start + width] - sums[start]) / width for start in range(len(values) - width + 1)]
    return _line(values[:width])[:half] + middle + _line(values[-width:])[half + 1 :]


def _line(values: list[float]) -> list[float]:
    """Returns the least-squares straight line through values at even distances, at the same places."""
    centre, mean = (len(values) - 1) / 2, sum(values) / max(1, len(values))
    squares = sum((index - centre) ** 2 for index in range(len(values)))
    slope = sum((index - centre) * value for index, value in enumerate(values)) / squares if squares else 0.0
    return [mean + slope * (index - centre) for index in range(len(values))]


def _thinned(x: list[int], y: list[float]) -> tuple[list[int], list[float]]:
    stride = len(x) // _MAX_POINTS + 1
    return x[::stride], y[::stride]


def _tokens_per_step(steps: Rows) -> float | None:
    last = steps[-1]
    return last["tokens_seen"] / last["step"] if last.get("tokens_seen") and last["step"] else None


def _frame_values(axes: Axes, values: list[float]) -> None:
    """Leaves room around what matters: single wild steps of the raw curve may leave the picture."""
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.1
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _finish(axes: Axes, steps: Rows, of_top: Axes | None = None) -> None:
    from matplotlib.ticker import MaxNLocator

    last_step, tokens_per_step = steps[-1]["step"], _tokens_per_step(steps)
    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, last_step * 1.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 2.5, 5, 10]))
    if tokens_per_step:
        tokens = (of_top or axes).secondary_xaxis("top", functions=_scale(tokens_per_step))
        tokens.set_xlabel("tokens seen")
        tokens.xaxis.set_major_formatter(_formatter())
    axes.legend(loc="best")


def _plain(value: float, _position: int) -> str:
    return f"{value:g}"


def _formatter() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _scale(factor: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Returns the conversion from steps to tokens and back, for numbers and arrays."""
    return (lambda steps: steps * factor), (lambda tokens: tokens / factor)
