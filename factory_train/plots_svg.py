"""A drawn figure as SVG for the inside of an HTML page: colours follow the page, and pointing at it tells the figures."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from factory_train.curves import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that people with any common colour blindness tell apart (Okabe and Ito 2008), and those of the frame around.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#555555"
INK, GRID, PAPER = "#1F2328", "#DDDDDE", "#FEFEFE"
# What the page calls each colour; it gives them other values in the dark.
VARIABLES = {
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    RED: "--red",
    PURPLE: "--purple",
    GREY: "--grey",
    INK: "--ink",
    GRID: "--grid",
    PAPER: "--paper",
}
# More places to point at than this cannot be told apart with a mouse.
_MAX_PLACES = 120
# SVG counts in points of a 72nd of an inch.
_DPI = 72.0


@dataclass(frozen=True)
class Curve:
    """What pointing at a plot tells about one line of it.

    Args:
        label: its name and unit, with `{}` for the value.
        steps: where it has values, ascending.
        values: as many.
    """

    label: str
    steps: Array
    values: Array


@dataclass
class Pointing:
    """What pointing at a figure tells.

    Args:
        axes: the columns that react, all with the same linear x axis.
        curves: told for the nearest step at or before the place.
        x_of_step: places of the steps on the x axis.
        steps: the steps that can be pointed at.
        prefix: what comes first for each of these steps.
    """

    axes: list[Axes] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    steps: Array = field(default_factory=lambda: np.zeros(0))
    x_of_step: Array = field(default_factory=lambda: np.zeros(0))
    prefix: list[str] = field(default_factory=list)


def places(count: int) -> list[int]:
    """Returns which of `count` steps can be pointed at."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, _MAX_PLACES))}) if count else []


def inline_svg(figure: Figure, name: str, alt: str, pointing: Pointing) -> str:
    """Returns the figure as an `<svg>` element that loads nothing and shares no id with another of the page.

    Args:
        figure: drawn with the colours of this module.
        name: distinguishes its ids.
        alt: what a person who cannot see it is told.
        pointing: where the tooltips are.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    # Its style sheet would hold for the whole page.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", text.getvalue(), flags=re.DOTALL)
    body = body[body.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    body = re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: _variable(match[0]), body)
    # The page's own font, and one line an element: the file is a third smaller.
    body = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", body)
    body = re.sub(r"\n\s*", "\n", body)
    width, height = figure.get_size_inches() * _DPI
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(alt)}">'
    return f"{head}{body}{_tooltips(pointing, width, height)}</svg>"


def _variable(color: str) -> str:
    variable = VARIABLES.get(color.upper())
    return f"var({variable})" if variable else color


def _tooltips(pointing: Pointing, width: float, height: float) -> str:
    """Returns an invisible column for each step that can be pointed at, with what it tells."""
    columns = []
    for axes in pointing.axes:
        low, high = axes.get_xlim()
        box = axes.get_position()
        left, right = box.x0 * width, box.x1 * width
        middles = left + (pointing.x_of_step - low) / (high - low) * (right - left)
        edges = np.concatenate(([left], (middles[1:] + middles[:-1]) / 2, [right]))
        top, tall = (1 - box.y1) * height, box.height * height
        for index, step in enumerate(pointing.steps):
            lines = [pointing.prefix[index], *(_told(curve, step) for curve in pointing.curves)]
            label = html.escape("\n".join(line for line in lines if line))
            x, wide = edges[index], max(edges[index + 1] - edges[index], 0.1)
            columns.append(f'<rect x="{x:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}"><title>{label}</title></rect>')
    return f'<g class="point">{"".join(columns)}</g>' if columns else ""


def _told(curve: Curve, step: float) -> str:
    place = int(np.searchsorted(curve.steps, step, side="right")) - 1
    return curve.label.format(f"{curve.values[place]:.4g}") if place >= 0 else ""
