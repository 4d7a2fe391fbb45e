"""What a report is made of: blocks that know their content and nothing of its looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from factory_train.plots import Plot
from factory_train.tracking.facts import RunFacts


class Mono(str):
    """Text in the letters of a typewriter: a path, a key, a hash."""

    __slots__ = ()


class Strong(str):
    """Text that stands out."""

    __slots__ = ()


@dataclass(frozen=True)
class Headline:
    """How a run stands, at first glance.

    Args:
        outcome: one of the verdicts, or running, pending, lost.
        progress: steps made of steps wanted.
        quotes: what went wrong and what would help, if anything did.
        figures: label and value.
    """

    outcome: str
    progress: str
    quotes: tuple[str, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Items:
    texts: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Args:
        numbers: columns of numbers, by place.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Code:
    """Text to be shown as it is; `folded` where it is long and seldom read."""

    text: str
    language: str = "text"
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    plot: Plot


@dataclass(frozen=True)
class Samples:
    """Step, prompt and continuation."""

    rows: Sequence[tuple[int, str, str]]


Block: TypeAlias = Paragraph | Items | Table | Code | Picture | Samples


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]


def shown_outcome(facts: RunFacts) -> str:
    """Returns how the run stands; the finish stage writes the report shortly before the verdict that says "done"."""
    outcome = facts.outcome
    if outcome == "running" and facts.evaluation and facts.evaluation["step"] >= facts.config.train.steps:
        return "done"
    return outcome
