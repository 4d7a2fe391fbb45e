"""A line of what `doctor` reports."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        about: what was looked at.
        level: "ok", "note" (works, and worth knowing) or "problem" (will not work).
        text: what was found.
        fix: what to do, for a problem.
    """

    about: str
    level: str
    text: str
    fix: str | None = None
