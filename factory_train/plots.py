"""The plots of a report, each as PNG for Markdown and as SVG for HTML, drawn once."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from factory_train.curves import Curves, smoothed
from factory_train.plots_figures import (
    draw_breakdown,
    draw_loss,
    draw_lr,
    draw_stalls,
    draw_throughput,
    draw_timeline,
    draw_validation,
)
from factory_train.plots_svg import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, Pointing, inline_svg
from factory_train.plots_svg import GRID as _GRID
from factory_train.plots_svg import INK as _INK
from factory_train.plots_svg import PAPER as _PAPER
from factory_train.tracking.facts import RunFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "RED", "STYLE", "Plot", "draw_plots", "smoothed"]

# What all plots have in common; those of a run also take the page's colours.
STYLE = {
    "figure.dpi": 130,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
}
_PAGE_STYLE = STYLE | {
    "savefig.facecolor": "white",
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.facecolor": _PAPER,
    "grid.linewidth": 0.8,
    "legend.facecolor": _PAPER,
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Plot:
    """One picture.

    Args:
        name: of its file, without the ending.
        title: heading above it.
        alt: what it shows, in words and figures.
        png, svg: the picture in both forms; the SVG is an element for the inside of a page.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: str


_Draw = Callable[["Figure", RunFacts, Curves, Pointing], str]
_PLOTS: tuple[tuple[str, str, _Draw], ...] = (
    ("loss", "Loss", draw_loss),
    ("throughput", "Throughput", draw_throughput),
    ("breakdown", "Where a step's time goes", draw_breakdown),
    ("lr", "Learning rate and gradient norm", draw_lr),
    ("validation", "Validation", draw_validation),
    ("stalls", "Waiting for checkpoints", draw_stalls),
    ("timeline", "Attempts on the clock", draw_timeline),
)


def draw_plots(facts: RunFacts, curves: Curves) -> list[Plot]:
    """Draws what there is to draw: nothing before the first step, and no plot that would be empty."""
    if not len(curves):
        return []
    import matplotlib
    from matplotlib.figure import Figure

    plots = []
    with matplotlib.rc_context(_PAGE_STYLE):
        for name, title, draw in _PLOTS:
            # A figure of its own draws with Agg and leaves no global state behind, unlike pyplot.
            figure, pointing = Figure(figsize=(9, 4.9), layout="constrained"), Pointing()
            alt = draw(figure, facts, curves, pointing)
            if not alt:
                continue
            png = io.BytesIO()
            figure.savefig(png, format="png")
            plots.append(Plot(name, title, alt, png.getvalue(), inline_svg(figure, name, alt, pointing)))
    return plots
