"""What happened to a run: attempts, events, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from factory_train.curves import Curves
from factory_train.plots import Plot
from factory_train.report_parts import Block, Items, Mono, Paragraph, Picture, Section, Table, shown_outcome
from factory_train.run_dir import Attempt
from factory_train.tracking.facts import RunFacts
from factory_train.units import format_duration, format_wait

# What happens in every attempt tells nothing; attempts and checkpoints have tables of their own.
_ROUTINE = {"prepare", "finish", "stage-start", "stage-end", "ranks-started", "checkpoint", "submit"}
_MAX_EVENTS = 60
_MAX_DETAIL_CHARS = 240


def attempts_section(facts: RunFacts, plots: list[Plot]) -> Section:
    head = ("attempt", "outcome", "last step", "ended", "reason")
    blocks: list[Block] = [Picture(plot) for plot in plots]
    return Section("Attempts", [*blocks, Table(head, [_attempt_row(facts, attempt) for attempt in facts.run.attempts()], numbers=(2,))])


def _attempt_row(facts: RunFacts, attempt: Attempt) -> tuple[str, ...]:
    verdict = attempt.verdict()
    if verdict is None:
        outcome = shown_outcome(facts) if attempt.number == facts.attempt.number else "lost"
        return (str(attempt.number), outcome, "", "", "")
    step = "" if verdict.step is None else str(verdict.step)
    return (str(attempt.number), verdict.outcome, step, _date(verdict.time), verdict.reason)


def events_section(facts: RunFacts) -> Iterator[Section]:
    """Yields what happened beside the routine, in the order of time."""
    rows = sorted((row for attempt in facts.run.attempts() for row in _events(attempt)), key=lambda row: row[0])
    if not rows:
        return
    shown = rows[-_MAX_EVENTS:]
    began = facts.info["created"]
    cells = [(format_duration(when - began), number, what, detail) for when, number, what, detail in shown]
    blocks: list[Block] = [Paragraph(f"The last {len(shown)} of {len(rows)}.")] if len(rows) > len(shown) else []
    yield Section("Events", [*blocks, Table(("after", "attempt", "event", "what"), cells)])


def _events(attempt: Attempt) -> Iterator[tuple[float, str, str, str]]:
    number = str(attempt.number)
    for event in attempt.events():
        if event["event"] not in _ROUTINE and not (event["event"] in ("exit", "tracker-exit") and event.get("exit_code") == 0):
            yield event["time"], number, event["event"], _detail(event)
    if (error := attempt.error()) and isinstance(error.get("time"), (int, float)):
        yield error["time"], number, "failure", _shortened(str(error.get("message") or ""))
    if verdict := attempt.verdict():
        yield verdict.time, number, f"ended: {verdict.outcome}", _shortened(verdict.reason)


def _detail(event: dict[str, Any]) -> str:
    facts = {name: value for name, value in event.items() if name not in ("time", "event") and value not in (None, "", [], {})}
    said = [str(facts.pop(name)) for name in ("message", "reason") if name in facts]
    return _shortened("; ".join(said + [f"{name.replace('_', ' ')} {value}" for name, value in facts.items()]))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_DETAIL_CHARS else line[: _MAX_DETAIL_CHARS - 1] + "…"


def checkpoints_section(facts: RunFacts, curves: Curves) -> Iterator[Section]:
    events = [event for attempt in facts.run.attempts() for event in attempt.events()]
    failed = [event for event in events if event["event"] == "checkpoint-failed"]
    if not facts.checkpoints and not failed:
        return
    saved = sum(event["event"] == "checkpoint" for event in events)
    waited = format_wait(curves.total("ckpt_stall_s"))
    blocks: list[Block] = [Items([Mono(f"checkpoints/{name}") for name in facts.checkpoints])] if facts.checkpoints else []
    blocks.append(Paragraph(f"{saved} saved, {len(failed)} failed; training waited {waited} for them in all."))
    if failed:
        blocks.append(Items([f"step {event['step']}: {event['message']}" for event in failed]))
    yield Section("Checkpoints", blocks)


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
