"""What came out of each point of a sweep, read from the run directories, the best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from factory_train import storage, tail
from factory_train.launchers.by_name import is_alive, scheduled
from factory_train.run_dir import RunDir
from factory_train.sweep import DONE, FAILED, NOT_RUN, PENDING, RUNNING, SweepDir, SweepPoint, SweepRecord

# The speed of a run is judged by this much of the end of its metrics.
_TAIL_BYTES = 4 << 20
# Outcomes of an attempt after which a scheduler may start the next.
_GOES_ON = ("preempted", "failed-transient")


@dataclass(frozen=True)
class PointResult:
    """How one point stands.

    Args:
        state: "not run", "pending", "running", "done", "preempted", "interrupted", "failed", "killed", or "lost" (no verdict).
        reason: why it is not done, one line.
        step, steps: how far it came, and its length; None before it started.
        loss: final validation loss in nats a token; None unless the point is done and it is finite.
        bits_per_byte: the same in bits a byte of text.
        tokens_per_s: median over all ranks.
        data_id: of the prepared data, tokenizer included.
        ended: when its run ended, in seconds since the epoch.
    """

    point: SweepPoint
    state: str
    reason: str = ""
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_s: float | None = None
    data_id: str | None = None
    ended: float | None = None


@dataclass(frozen=True)
class SweepResults:
    """All points, the best first; those without a result last, in the order of the command.

    Args:
        ranked_by: "loss"; "bits_per_byte" where points differ in their tokens, so that losses do not compare.
    """

    name: str
    axes: tuple[str, ...]
    points: tuple[PointResult, ...]
    ranked_by: str

    @property
    def best(self) -> PointResult | None:
        first = self.points[0] if self.points else None
        return first if first is not None and first.loss is not None else None

    def counts(self) -> dict[str, int]:
        """Returns how many points are in each state, the usual states first."""
        states = [result.state for result in self.points]
        order = [DONE, FAILED, RUNNING, *sorted({*states} - {DONE, FAILED, RUNNING, NOT_RUN}), NOT_RUN]
        return {state: states.count(state) for state in order if state in states}

    def headline(self) -> str:
        """Returns the counts in words: 3 done, 1 failed."""
        return ", ".join(f"{count} {state}" for state, count in self.counts().items())


def read_results(sweep: SweepDir, record: SweepRecord | None = None) -> SweepResults:
    """Reads how every point stands now."""
    record = record or sweep.record()
    found = [read_point(sweep, point) for point in record.points]
    same_tokens = len({result.data_id for result in found if result.loss is not None}) <= 1
    ranked_by = "loss" if same_tokens else "bits_per_byte"
    ranked = sorted(found, key=lambda result: _rank(getattr(result, ranked_by)))
    return SweepResults(sweep.name, tuple(record.axes), tuple(ranked), ranked_by)


def _rank(figure: float | None) -> float:
    return math.inf if figure is None else figure


def read_point(sweep: SweepDir, point: SweepPoint) -> PointResult:
    """Reads how one point stands; its run directory knows better than the record of the sweep."""
    run = sweep.run(point)
    if run is None:
        return PointResult(point, point.state if point.reason else NOT_RUN, point.reason)
    attempt = run.last_attempt()
    assert attempt is not None
    verdict, steps = attempt.verdict(), attempt.config().train.steps
    speeds, last = _speeds(run)
    step = verdict.step if verdict and verdict.step is not None else last
    manifest = storage.read_json(run.data / "manifest.json") or {}
    common: dict[str, Any] = {"step": step, "steps": steps, "data_id": manifest.get("id"), "tokens_per_s": _median(speeds)}
    alive = _alive(run) if verdict is None or verdict.outcome in _GOES_ON else None
    if alive is not None:
        return PointResult(point, alive, **common)
    if verdict is None:
        # Its job is written right after the attempt, and the record is the younger where the run was not even submitted.
        return PointResult(point, "lost" if not point.reason else FAILED, point.reason or "it ended without a verdict", **common)
    state = verdict.outcome.partition("-")[0]
    if state != DONE:
        return PointResult(point, state, verdict.reason, ended=verdict.time, **common)
    files = sorted(run.evaluation.glob("step-*.json"))
    evaluation = storage.read_json(files[-1]) if files else {}
    loss, bits = (_finite(evaluation.get(name)) for name in ("loss", "bits_per_byte"))
    reason = "" if loss is not None else "its validation loss is not finite" if evaluation else "it was not evaluated"
    return PointResult(point, DONE, reason, loss=loss, bits_per_byte=bits, ended=verdict.time, **common)


def _alive(run: RunDir) -> str | None:
    """Returns whether a run that has not ended for good runs or waits for a scheduler; None when it does neither."""
    if not is_alive(run):
        return None
    handle = scheduled(run)
    return PENDING if handle is not None and handle.status() == PENDING else RUNNING


def _speeds(run: RunDir) -> tuple[list[float], int | None]:
    """Returns the speeds of the newest steps and the number of the last step."""
    speeds: list[float] = []
    last = None
    for attempt in reversed(run.attempts()):
        for row in tail.rows_backwards(attempt.metrics_path, _TAIL_BYTES):
            if row["kind"] == "train":
                last = last or row["step"]
                if row.get("tokens_per_s"):
                    speeds.append(row["tokens_per_s"])
        if speeds:
            break
    return speeds, last


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
