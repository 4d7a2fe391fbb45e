"""A report as one HTML page that needs no network, no JavaScript and no other file."""

from __future__ import annotations

import html
import re
import time
from collections.abc import Iterator

from factory_train.report_content import ReportContent
from factory_train.report_parts import Block, Code, Headline, Items, Mono, Paragraph, Picture, Samples, Section, Strong, Table
from factory_train.report_style import STYLE

# Which colour an outcome has.
_TONES = {"done": "good", "running": "busy", "pending": "busy", "preempted": "pause", "interrupted": "pause"}
# C0 and C1 control characters, which HTML does not allow, apart from tab and newline; surrogates cannot be written at all.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def to_html(content: ReportContent) -> str:
    """Returns the text of report.html."""
    names = [_anchor(section, index) for index, section in enumerate(content.sections)]
    links = "".join(
        f'<li><a href="#{name}">{_escaped(section.title)}</a></li>' for name, section in zip(names, content.sections, strict=True)
    )
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(content.written))
    title = _escaped(content.title)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">',
        f"<title>{title}: report</title>\n<style>\n{STYLE}</style>\n</head>\n<body>",
        f"<header>\n<h1>{title}</h1>",
        *_headline(content.headline),
        f'</header>\n<nav aria-label="Sections"><ul>{links}</ul></nav>\n<main>',
    ]
    for name, section in zip(names, content.sections, strict=True):
        parts.append(f'<section id="{name}">\n<h2>{_escaped(section.title)}</h2>')
        for block in section.blocks:
            parts += _block(block)
        parts.append("</section>")
    parts.append(f"</main>\n<footer>Written by factory_train on {written} from the run directory.</footer>\n</body>\n</html>")
    return "\n".join(parts) + "\n"


def _anchor(section: Section, index: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or f"section-{index}"


def _headline(headline: Headline) -> Iterator[str]:
    tone = _TONES.get(headline.outcome, "bad")
    yield f'<p class="verdict"><strong class="{tone}">{_escaped(headline.outcome)}</strong> {_escaped(headline.progress)}</p>'
    for quote in headline.quotes:
        yield f"<blockquote>{_escaped(quote)}</blockquote>"
    if headline.figures:
        cards = "".join(f"<div><dt>{_escaped(label)}</dt><dd>{_escaped(value)}</dd></div>" for label, value in headline.figures)
        yield f'<dl class="figures">{cards}</dl>'


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Paragraph):
        yield f"<p>{_escaped(block.text)}</p>"
    elif isinstance(block, Items):
        yield "<ul>" + "".join(f"<li>{_cell(text)}</li>" for text in block.texts) + "</ul>"
    elif isinstance(block, Table):
        yield _table(block)
    elif isinstance(block, Code):
        # The first newline behind <pre> is dropped by every reader, so one more keeps that of the text.
        code = f'<pre tabindex="0">\n{_escaped(block.text)}</pre>'
        yield f"<details><summary>All {len(block.text.splitlines())} lines</summary>{code}</details>" if block.folded else code
    elif isinstance(block, Picture):
        caption = f"<figcaption>{_escaped(block.plot.alt)}</figcaption>"
        yield f'<figure><div class="picture" tabindex="0">{block.plot.svg}</div>{caption}</figure>'
    elif isinstance(block, Samples):
        yield '<div class="wide" tabindex="0"><table class="samples">'
        yield '<thead><tr><th scope="col" class="number">step</th><th scope="col">prompt » continuation</th></tr></thead><tbody>'
        for step, prompt, text in block.rows:
            words = f'<span class="prompt">{_escaped(prompt)}</span> <span class="mark">»</span> {_escaped(text)}'
            yield f'<tr><th scope="row" class="number">{step:,}</th><td class="text">{words}</td></tr>'
        yield "</tbody></table></div>"


def _table(table: Table) -> str:
    kinds = [' class="number"' if column in table.numbers else "" for column in range(len(table.head))]
    head = "".join(f'<th scope="col"{kind}>{_escaped(text)}</th>' for kind, text in zip(kinds, table.head, strict=True))
    lines = [f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>']
    for row in table.rows:
        first, *rest = zip(kinds, row, strict=True)
        cells = f'<th scope="row"{first[0]}>{_cell(first[1])}</th>' + "".join(f"<td{kind}>{_cell(text)}</td>" for kind, text in rest)
        lines.append(f"<tr>{cells}</tr>")
    return "\n".join(lines) + "</tbody></table></div>"


def _cell(text: str) -> str:
    if isinstance(text, Mono):
        return f"<code>{_escaped(text)}</code>"
    return f"<strong>{_escaped(text)}</strong>" if isinstance(text, Strong) else _escaped(text)


def _escaped(text: str) -> str:
    return html.escape(_CONTROL.sub("\ufffd", text))
