"""`report RUN`: one run on one page, as Markdown and as HTML, from its directory alone."""

from __future__ import annotations

from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, the_run
from factory_train.commands.summary import shown


def main(argv: list[str]) -> int:
    """Writes both reports of a run, which may be running, prints where they are, and returns 0.

    Raises:
        NotFoundError: there is no such run, or it was never started.
    """
    parser = ArgumentParser(
        "report",
        "Writes report.html and report.md from the run directory, at any time: while the run goes on, too.",
        "example: report 7k2m9x",
    )
    add_words(parser)
    run, _ = the_run("report", parser.parse(argv).words)

    from factory_train.report import write_report
    from factory_train.tracking.facts import html_report_path

    markdown = write_report(run)
    print(f"page        {shown(html_report_path(run))} (one file: open it in a browser, or send it)")
    print(f"markdown    {shown(markdown)}, plots in {shown(run.path / 'report')}")
    return 0
