"""Points of a sweep, a bounded number at once: on this machine, sharing its cores, memory and cards, or each a job of a Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from factory_train import storage
from factory_train.commands import submission
from factory_train.commands.submission import Request, Started
from factory_train.commands.sweep_point import Draft
from factory_train.commands.sweep_view import SweepView
from factory_train.config import Config
from factory_train.errors import ExitCode, FactoryTrainError, PreflightError
from factory_train.hardware import num_cores, visible_cards
from factory_train.sweep import DONE, FAILED, RUNNING, SweepDir, SweepRecord
from factory_train.sweep_results import read_point
from factory_train.units import format_bytes

_POLL_S = 0.2


def at_once(wanted: int, num_points: int) -> int:
    """Returns how many points run at once."""
    return max(1, min(wanted, num_points))


def share_cores(config: Config, together: int, num_ranks: int) -> Config:
    """Returns the configuration of a point of `num_ranks` ranks with its part of the cores, unless it says itself how many."""
    if together == 1 or config.train.num_threads is not None:
        return config
    return replace(config, train=replace(config.train, num_threads=max(1, num_cores() // (together * num_ranks))))


def check_room(requests: Sequence[Request], together: int) -> None:
    """Checks that the largest points fit beside each other.

    Raises:
        PreflightError: the memory, the disk or the cards do not suffice for `launcher.sweep_parallel`.
    """
    if together == 1:
        return
    plans = [request.plan for request in requests]
    if any(plan.device == "cuda" for plan in plans):
        width, cards = max(plan.tasks_per_node for plan in plans), len(visible_cards())
        if together * width > cards:
            fits = (
                f"launcher.tasks_per_node={cards // together}" if cards >= together else f"launcher.sweep_parallel={max(1, cards // width)}"
            )
            raise PreflightError(
                f"{together} points at once on {width} cards each need {together * width} cards, and this machine has {cards}",
                where="launcher.sweep_parallel",
                fix=fits,
            )
        return
    # The plan gives each rank its part of the memory that is free.
    free = max((plan.device_memory_bytes * plan.tasks_per_node for plan in plans if plan.device_memory_bytes is not None), default=None)
    sizes = sorted((plan.memory.total * plan.tasks_per_node for plan in plans), reverse=True)
    if free is not None and sum(sizes[:together]) > free:
        fitting = max((count for count in range(1, together) if sum(sizes[:count]) <= free), default=1)
        raise PreflightError(
            f"{together} points at once need about {format_bytes(sum(sizes[:together]))}, and {format_bytes(free)} are free",
            where="launcher.sweep_parallel",
            fix=f"launcher.sweep_parallel={fitting}",
        )


def check_disk(requests: Sequence[Request], together: int) -> None:
    """Checks that what all points leave behind fits on the disk; each alone has been checked before.

    Raises:
        PreflightError: it does not.
    """
    left = [request for request in requests if not submission.is_finished(request)]
    sizes = [request.plan.checkpoint_bytes for request in left]
    exports = [4 * request.plan.params.total for request in left]
    keep_last = max((request.config.checkpoint.keep_last for request in left), default=1)
    # While a checkpoint is written, those that will be kept are still all there.
    need = keep_last * sum(sizes) + sum(exports) + sum(sorted(sizes, reverse=True)[:together])
    free = storage.free_bytes(requests[0].root)
    if need > free:
        raise PreflightError(
            f"the disk is too full for all points: {format_bytes(free)} free, about {format_bytes(need)} needed for "
            f"{keep_last} checkpoints and the export of each of {len(left)}",
            where=str(requests[0].root),
            fix="checkpoint.keep_last=1, or runs_root=FOLDER on another disk" if keep_last > 1 else "runs_root=FOLDER on another disk",
        )


def exit_code_of(signum: int) -> int:
    """Returns what a sweep exits with that this signal ended."""
    return ExitCode.INTERRUPTED if signum == signal.SIGINT else ExitCode.PREEMPTED


@dataclass(frozen=True)
class _Running:
    draft: Draft
    started: Started
    slot: int


def run_points(sweep: SweepDir, record: SweepRecord, drafts: Sequence[Draft], view: SweepView, received: Sequence[int]) -> list[int]:
    """Runs the points in order, at most `launcher.sweep_parallel` at once; a failed one does not keep the others back.

    A signal goes to all that are running, which save and stop; no more are started then.

    Args:
        received: grows as signals arrive.

    Returns:
        Exit codes of the points that ran or could not be started.
    """
    together = at_once(drafts[0].request.config.launcher.sweep_parallel, len(drafts))
    waiting, running, codes, passed_on = list(drafts), list[_Running](), list[int](), 0
    while running or (waiting and not received):
        while waiting and len(running) < together and not received:
            slot = min({*range(together)} - {point.slot for point in running})
            draft = waiting.pop(0)
            try:
                started = submission.start(_on_cards(draft.request, slot, together))
            except (FactoryTrainError, OSError) as error:
                codes.append(_not_started(sweep, record, draft, view, error))
                continue
            if started is not None:
                running.append(_Running(draft, started, slot))
            note(sweep, record, draft, RUNNING if started else DONE)
            if started is not None:
                view.started(draft, started)
            else:
                view.finished_before(draft)
        for signum in received[passed_on:]:
            for point in running:
                point.started.handle.signal(signum)
            view.signalled(signum, len(running), first=passed_on == 0)
            passed_on += 1
        for point in [point for point in running if point.started.handle.wait(0)]:
            running.remove(point)
            result = read_point(sweep, point.draft.point)
            note(sweep, record, point.draft, result.state)
            newest = point.started.attempt.run.last_attempt() or point.started.attempt
            verdict = newest.verdict()
            codes.append(verdict.exit_code if verdict else point.started.handle.exit_code or ExitCode.FAILED)
            view.ended(point.draft, result)
        view.update()
        time.sleep(_POLL_S if running else 0)
    return codes


def note(sweep: SweepDir, record: SweepRecord, draft: Draft, state: str, reason: str = "") -> None:
    """Puts the state of a point into the record."""
    draft.point.state, draft.point.reason = state, reason
    sweep.save(record)


def _not_started(sweep: SweepDir, record: SweepRecord, draft: Draft, view: SweepView, error: Exception) -> int:
    reason = error.what if isinstance(error, FactoryTrainError) else str(error)
    note(sweep, record, draft, FAILED, f"not started: {reason}")
    view.ended(draft, read_point(sweep, draft.point))
    return error.exit_code if isinstance(error, FactoryTrainError) else ExitCode.FAILED


def _on_cards(request: Request, slot: int, together: int) -> Request:
    """Returns the request with cards of its own, where points on this machine would otherwise all take the first."""
    if together == 1 or request.plan.device != "cuda" or request.config.launcher.name != "local":
        return request
    return replace(
        request,
        environ={**request.environ, **cards_of_slot(slot, request.plan.tasks_per_node, len(visible_cards()) // together, os.environ)},
    )


def cards_of_slot(slot: int, num_ranks: int, width: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment that shows a job its own cards.

    Args:
        slot: which of the jobs that run at once it is.
        num_ranks: cards it needs.
        width: cards set aside for each slot.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else [str(card) for card in range((slot + 1) * width)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[slot * width : slot * width + num_ranks])}
