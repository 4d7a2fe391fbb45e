"""table.csv, report.md and plots of a sweep: all points beside each other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from factory_train import storage
from factory_train.sweep import DONE, SweepDir, shown_value
from factory_train.sweep_plots import PLOTS, write_plots
from factory_train.sweep_results import PointResult, SweepResults, read_results
from factory_train.units import format_count

_CSV_FIGURES = ("loss", "bits_per_byte", "tokens_per_s", "step", "steps", "state", "reason")
_RANKED_BY = {
    "loss": "validation loss",
    "bits_per_byte": "bits a byte of text, for the points differ in their tokens and losses a token do not compare",
}


def write_sweep_report(sweep: SweepDir) -> SweepResults:
    """Writes table.csv, the plots and report.md from what the run directories hold by now; writing again replaces them.

    Returns:
        What the table shows.
    """
    results = read_results(sweep)
    storage.write_atomic(sweep.table_path, csv_table(results))
    plots = write_plots(sweep, results)
    sections = [
        f"# {sweep.name}",
        f"**{results.headline()}** of {len(results.points)} points.",
        *_best(results),
        markdown_table(results),
        f"Sorted by {_RANKED_BY[results.ranked_by]}. Speeds are those of all ranks of a point, the median of its steps.",
        *_failures(results),
        *(f"## {PLOTS[path.name]}\n\n![{PLOTS[path.name]}](report/{path.name})" for path in plots),
        *_next(sweep, results),
    ]
    storage.write_atomic(sweep.report_path, "\n\n".join(sections) + "\n")
    return results


def header(results: SweepResults) -> tuple[str, ...]:
    """Returns the names of the columns of `cells`."""
    return ("", *results.axes, "loss", "bits/byte", "tok/s", "run", "state")


def cells(results: SweepResults) -> Iterator[tuple[str, ...]]:
    """Yields one row a point for a person, the best first; only what differs between points is a column."""
    for result in results.points:
        yield (
            "best" if result is results.best else "",
            *(shown_value(result.point.values.get(axis)) for axis in results.axes),
            _figure(result.loss),
            _figure(result.bits_per_byte),
            format_count(result.tokens_per_s) if result.tokens_per_s else "-",
            result.point.run,
            state_text(result),
        )


def state_text(result: PointResult) -> str:
    """Returns how a point ended, and why where that matters."""
    far = f" at step {result.step or 0}/{result.steps}" if result.steps and result.state != DONE else ""
    return f"{result.state}{far}" + (f": {result.reason}" if result.reason else "")


def markdown_table(results: SweepResults) -> str:
    """Returns the comparison as a Markdown table."""
    head = header(results)
    numbers = {"loss", "bits/byte", "tok/s"}
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---:" if name in numbers else "---" for name in head) + "|"]
    for row in cells(results):
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines)


def csv_table(results: SweepResults) -> str:
    """Returns the comparison for programs: full precision, empty where there is no figure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("point", "run", *results.axes, *_CSV_FIGURES))
    for result in results.points:
        values = (shown_value(result.point.values.get(axis)) for axis in results.axes)
        writer.writerow((result.point.number, result.point.run, *values, *(getattr(result, name) for name in _CSV_FIGURES)))
    return text.getvalue()


def _best(results: SweepResults) -> Iterator[str]:
    if best := results.best:
        values = f": `{best.point.label}`" if best.point.label else ""
        yield f"Best: `{best.point.run}`{values}, {best.loss:.4f} nats/token, {_figure(best.bits_per_byte)} bits per byte."


def _failures(results: SweepResults) -> Iterator[str]:
    failed = [result for result in results.points if result.state != DONE and result.reason]
    if failed:
        yield "## What is not done"
        yield "\n".join(f"- `{result.point.run}` (`{result.point.label}`) {state_text(result)}" for result in failed)


def _next(sweep: SweepDir, results: SweepResults) -> Iterator[str]:
    yield "## Next"
    lines = [f"python -m factory_train sync {sweep.name}"]
    if results.best:
        lines.insert(0, f"python -m factory_train generate {results.best.point.run} PROMPT")
    yield "```sh\n" + "\n".join(lines) + "\n```"
    if any(result.state != DONE for result in results.points):
        yield f"The same command with `sweep={sweep.record().id}` runs what is not done."


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
