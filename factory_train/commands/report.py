"""`report RUN | SWEEP`: a run on one page, or the points of a sweep beside each other, from their directories alone."""

from __future__ import annotations

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, split_words, the_run
from factory_train.commands.summary import shown
from factory_train.commands.sweep_view import table_lines
from factory_train.runs_index import runs_root
from factory_train.sweep import SweepDir, find_sweep


def main(argv: list[str]) -> int:
    """Writes the reports of a run or a sweep, which may be running, prints where they are, and returns 0.

    Raises:
        NotFoundError: there is no such run, or it was never started.
    """
    parser = ArgumentParser(
        "report",
        "Writes report.html and report.md from the run directory, at any time: while the run goes on, too.",
        "example: report 7k2m9x",
    )
    add_words(parser)
    words = parser.parse(argv).words
    name, settings = split_words("report", words, ())
    sweep = find_sweep(runs_root(settings.get("runs_root")), name) if name else None
    if sweep is not None:
        return _compare(sweep)
    run, _ = the_run("report", words)

    from factory_train.report import write_report
    from factory_train.tracking.facts import html_report_path

    markdown = write_report(run)
    print(f"page        {shown(html_report_path(run))} (one file: open it in a browser, or send it)")
    print(f"markdown    {shown(markdown)}, plots in {shown(run.path / 'report')}")
    return 0


def _compare(sweep: SweepDir) -> int:
    from factory_train.sweep_report import write_sweep_report

    results = write_sweep_report(sweep)
    print("\n".join(table_lines(results)))
    print(f"sweep       {sweep.name}: {results.headline()}")
    print(f"report      {shown(sweep.report_path)}, {sweep.table_path.name}")
    return 0
