"""report.md and report.html: one run on one page, with plots; from the run directory alone."""

from __future__ import annotations

from pathlib import Path

from factory_train import storage
from factory_train.curves import read_curves
from factory_train.plots import draw_plots
from factory_train.report_content import make_content
from factory_train.report_html import to_html
from factory_train.report_markdown import to_markdown
from factory_train.run_dir import RunDir
from factory_train.tracking.facts import html_report_path, read_facts

_PLOTS_FOLDER = "report"


def write_report(run: RunDir) -> Path:
    """Writes report.md, its plots and report.html from whatever the run directory holds by now; returns the path of report.md.

    Works for a run that has not taken a step, that is running, that failed, or that had several attempts; writing it
    again replaces it.

    Raises:
        NotFoundError: the run was never started.
    """
    facts, curves = read_facts(run), read_curves(run)
    plots, folder = draw_plots(facts, curves), run.path / _PLOTS_FOLDER
    for plot in plots:
        storage.write_atomic(folder / f"{plot.name}.png", plot.png)
    # Of an earlier time, before a later attempt went back.
    for left_over in {path.stem for path in folder.glob("*.png")} - {plot.name for plot in plots}:
        (folder / f"{left_over}.png").unlink(missing_ok=True)
    content = make_content(facts, curves, plots)
    storage.write_atomic(html_report_path(run), to_html(content))
    storage.write_atomic(run.report_path, to_markdown(content, _PLOTS_FOLDER))
    return run.report_path
