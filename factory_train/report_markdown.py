"""A report as Markdown, with its pictures beside it."""

from __future__ import annotations

from collections.abc import Iterator

from factory_train.report_content import ReportContent
from factory_train.report_parts import Block, Code, Headline, Items, Mono, Paragraph, Picture, Samples, Strong, Table


def to_markdown(content: ReportContent, plots_folder: str) -> str:
    """Returns the text of report.md.

    Args:
        plots_folder: where the pictures are, as seen from the file.
    """
    parts = [f"# {_safe(content.title)}", *_headline(content.headline)]
    for section in content.sections:
        parts.append(f"## {_safe(section.title)}")
        for block in section.blocks:
            parts += _block(block, plots_folder)
    text = "\n\n".join(parts) + "\n"
    # Half a character, as a sample may hold, cannot be written.
    return text.encode(errors="replace").decode()


def _headline(headline: Headline) -> Iterator[str]:
    if headline.quotes:
        yield f"**{headline.outcome}** after {headline.progress}."
        yield "\n>\n".join(f"> {_safe(quote)}" for quote in headline.quotes)
    else:
        yield f"**{headline.outcome}**, {headline.progress}."
    if headline.figures:
        yield _table(Table(("figure", "value"), headline.figures))


def _block(block: Block, plots_folder: str) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield _safe(block.text)
    elif isinstance(block, Items):
        yield "\n".join(f"- {_cell(text)}" for text in block.texts)
    elif isinstance(block, Table):
        yield _table(block)
    elif isinstance(block, Code):
        yield _fenced(block.text, block.language)
    elif isinstance(block, Picture):
        yield f"![{block.plot.title}]({plots_folder}/{block.plot.name}.png)"
        yield _safe(block.plot.alt)
    elif isinstance(block, Samples):
        # A table cannot hold text of several lines.
        for step, prompt, text in block.rows:
            yield f"Step {step}:"
            yield _fenced(f"{prompt} » {text}", "text")


def _table(table: Table) -> str:
    marks = "".join("---:|" if column in table.numbers else "---|" for column in range(len(table.head)))
    lines = ["| " + " | ".join(table.head) + " |", "|" + marks]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in table.rows])


def _cell(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    if isinstance(text, Mono):
        return f"`{line}`" if line and "`" not in line else _safe(line)
    return f"**{_safe(line)}**" if isinstance(text, Strong) else _safe(line)


def _safe(text: str) -> str:
    """Keeps text from being taken for HTML, which Markdown passes on."""
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
