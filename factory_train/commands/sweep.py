"""`train --multirun`: every combination of values as a run of its own, compared at the end.

All points are checked and planned before the first starts. What carries them out is behind `Runner`: on this machine
`sweep_local.run_points`, on Slurm `sweep_slurm.run_points`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from factory_train import storage
from factory_train.commands import submission, sweep_local, sweep_slurm
from factory_train.commands.follow import passing_on_signals
from factory_train.commands.summary import shown
from factory_train.commands.sweep_point import Draft
from factory_train.commands.sweep_view import SweepView, table_lines
from factory_train.compose import compose_run, groups
from factory_train.config import Config, flatten
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, PreflightError
from factory_train.launchers.environment import import_environ
from factory_train.overrides import sweep_points
from factory_train.runs_index import runs_root
from factory_train.schema import leaves
from factory_train.sweep import (
    DONE,
    NOT_RUN,
    SweepDir,
    SweepPoint,
    SweepRecord,
    find_sweep,
    new_record,
    shown_value,
    sweep_folder,
    this_process,
    value_key,
)
from factory_train.sweep_results import SweepResults

# Keys that say how the whole sweep is run and kept; no two points can differ in them.
_SHARED = (
    "runs_root",
    "sweep",
    "wait",
    "launcher.name",
    "launcher.sweep_parallel",
    "tracking.backend",
    "tracking.uri",
    "tracking.experiment",
)
_SYNC_LIMIT_S = 60.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Prepared:
    """A sweep of which nothing has been written.

    Args:
        drafts: the points the command asks for; the record may have more, of earlier commands.
        before: sweep.json as it was read; None for a new sweep.
    """

    sweep: SweepDir
    record: SweepRecord
    drafts: tuple[Draft, ...]
    before: bytes | None


# Runs points until all have ended or a signal came, keeping their states in the record; returns an exit code for each that ran,
# or None where a scheduler has them and nobody waits.
Runner = Callable[[SweepDir, SweepRecord, Sequence[Draft], SweepView, Sequence[int]], list[int] | None]


def main(
    overrides: Sequence[str], argv: Sequence[str], config_dir: str | None, *, force: bool, dry_run: bool, show: Callable[[Draft], Any]
) -> int:
    """Runs the points of a sweep and compares them; returns the worst of their exit codes.

    Args:
        overrides: words of the command; several values of a key ask for a run each.
        argv: the whole command, for the record.
        show: tells about one point of a dry run.

    Raises:
        FactoryTrainError: whatever stands in the way of any point, before the first starts.
    """
    prepared = _prepare(overrides, argv, config_dir, force=force, dry_run=dry_run)
    if not dry_run:
        return _carry_out(prepared, argv)
    for number, draft in enumerate(prepared.drafts, start=1):
        print(f"[{number}/{len(prepared.drafts)}] {draft.point.label}")
        show(draft)
    if sweep_slurm.is_meant(prepared.drafts):
        print(sweep_slurm.describe(prepared.sweep, prepared.drafts))
    return ExitCode.OK


def _prepare(overrides: Sequence[str], argv: Sequence[str], config_dir: str | None, *, force: bool, dry_run: bool) -> Prepared:
    words = sweep_points(overrides, groups(config_dir))
    compositions = [compose_run(point, config_dir) for point in words]
    configs = [composition.config for composition in compositions]
    first = configs[0]
    _check_shared(configs)
    root = runs_root(first.runs_root)
    known = find_sweep(root, first.sweep) if first.sweep else None
    axes = _axes(words)
    before = known.record_path.read_bytes() if known else None
    record = known.record() if known else new_record(first.recipe, first.sweep, axes)
    more = [axis for axis in axes if axis not in record.axes]
    if known and more:
        raise ConfigError(
            f"{known.name} varies {' '.join(record.axes) or 'nothing'}, and this command also {' '.join(more)}",
            where="sweep",
            fix="take another sweep=NAME",
        )
    values = [_values(record.axes, config, point) for config, point in zip(configs, words, strict=True)]
    _check_distinct(configs, values)
    together = sweep_local.at_once(first.launcher.sweep_parallel, len(configs))
    drafts = []
    # All of them are checked before the first is started.
    for composition, point_values in zip(compositions, values, strict=True):
        point = _point(record, composition.config, point_values)
        try:
            # A dry run has no use for a name that the next command will not take.
            is_named = not dry_run or first.sweep is not None
            config = replace(composition.config, sweep=record.id, run=record.run_id(point.number)) if is_named else composition.config
            request = submission.check_request(config, argv, force=force, dry_run=dry_run)
        except FactoryTrainError as error:
            label = point.label or f"point {point.number}"
            error.where = f"{error.where} ({label})" if error.where else label
            error.fix = error.fix.replace("take another run=NAME", "take another sweep=NAME") if error.fix else None
            raise
        if request.config.launcher.name != "slurm":
            # Somebody has to start the next.
            request = replace(request, config=replace(request.config, wait=config.wait is not False))
        if request.config.launcher.name == "local":
            request = replace(request, config=sweep_local.share_cores(request.config, together, request.plan.tasks_per_node))
        drafts.append(Draft(point, request, composition))
    requests = [draft.request for draft in drafts]
    if configs[0].wait is False and not sweep_slurm.is_meant(drafts):
        raise ConfigError(
            "somebody has to wait for the runs of a sweep, to start the next and to compare them", where="wait", fix="wait=true"
        )
    if requests[0].config.launcher.name == "allocation" and together > 1:
        raise ConfigError(
            "every point takes the whole allocation, so they run one after the other",
            where="launcher.sweep_parallel",
            fix="launcher.sweep_parallel=1; launcher=slurm makes an array of them",
        )
    if not dry_run:
        sweep_local.check_disk(requests, together)
    if requests[0].config.launcher.name == "local":
        sweep_local.check_room(requests, together)
    return Prepared(known or sweep_folder(root, record), record, tuple(drafts), before)


def _check_shared(configs: Sequence[Config]) -> None:
    if any(config.run is not None for config in configs):
        raise ConfigError("one name cannot name every run of a sweep", where="run", fix="leave run= out; sweep=NAME names the sweep")
    flat = [flatten(config) for config in configs]
    for key in _SHARED:
        if len({value_key(values[key]) for values in flat}) > 1:
            raise ConfigError("the points of a sweep cannot differ in this", where=key, fix=f"one value: {key}={shown_value(flat[0][key])}")


def _axes(words: Sequence[Sequence[str]]) -> list[str]:
    """Returns the keys and groups that have several values, in the order of the command."""
    varying = [column[0] for column in zip(*words, strict=True) if len(set(column)) > 1]
    return list(dict.fromkeys(_name(word) for word in varying))


def _name(word: str) -> str:
    return word.partition("=")[0].strip().lstrip("+")


def _values(axes: Sequence[str], config: Config, words: Sequence[str]) -> dict[str, Any]:
    """Returns the values of a point: those of keys as they were understood, options of groups as they were written."""
    flat, options = flatten(config), {_name(word): word.partition("=")[2] for word in words}
    for axis in axes:
        if axis not in leaves() and axis not in options:
            raise ConfigError(
                f"the sweep varies {axis}, and this command leaves it out", where="sweep", fix=f"{axis}=..., or another sweep=NAME"
            )
    # `recipe` and `model` name groups; a leaf of the same name holds what the group's file says.
    return {axis: flat[axis] if axis in leaves() else options[axis] for axis in axes}


def _check_distinct(configs: Sequence[Config], values: Sequence[dict[str, Any]]) -> None:
    seen: dict[Any, int] = {}
    for index, config in enumerate(configs):
        key = tuple((name, value_key(value)) for name, value in flatten(config).items())
        if key in seen:
            label = " ".join(f"{axis}={shown_value(value)}" for axis, value in values[index].items())
            raise ConfigError(
                f"points {seen[key] + 1} and {index + 1} are the same" + (f" ({label})" if label else ""),
                where="--multirun",
                fix="give each value once; train.seed=1,2 repeats with other seeds",
            )
        seen[key] = index


def _point(record: SweepRecord, config: Config, values: dict[str, Any]) -> SweepPoint:
    """Returns the point of these values, a new one if the sweep has none yet."""
    for point in record.points:
        if point.values == values:
            return point
    number = len(record.points) + 1
    record.points.append(SweepPoint(number, values, f"{config.recipe}-{record.run_id(number)}"))
    return record.points[-1]


def _carry_out(prepared: Prepared, argv: Sequence[str]) -> int:
    sweep, record, drafts = prepared.sweep, prepared.record, prepared.drafts
    sweep.path.mkdir(parents=True, exist_ok=True)
    with sweep.held(), passing_on_signals() as received:
        if (sweep.record_path.read_bytes() if sweep.record_path.is_file() else None) != prepared.before:
            raise PreflightError(
                f"another command has run sweep '{sweep.name}' meanwhile", where=str(sweep.path), fix="the same command again"
            )
        record.argv, record.owner, record.ended = list(argv), this_process(), None
        for draft in drafts:
            draft.point.state, draft.point.reason = NOT_RUN, ""
        sweep.save(record)
        view = SweepView(sweep, drafts)
        view.begin(is_new=prepared.before is None)
        runner: Runner = sweep_slurm.run_points if sweep_slurm.is_meant(drafts) else sweep_local.run_points
        try:
            codes = runner(sweep, record, drafts, view, received)
        except BaseException:
            if prepared.before is None and not any(sweep.run(point) for point in record.points):
                # Nothing was started, so the name stays free for the command that will be right.
                shutil.rmtree(sweep.path)
            raise
        view.close()
        if codes is None:
            sweep.save(record)
            for index, words in enumerate(sweep_slurm.next_commands(sweep)):
                print(f"{'' if index else 'next':<10}  {words}")
            return ExitCode.OK
        record.ended = time.time()
        sweep.save(record)
        return _conclude(prepared, codes, received)


def _conclude(prepared: Prepared, codes: Sequence[int], received: Sequence[int]) -> int:
    """Compares the points, sends the comparison, and tells what came out; returns the exit code of the sweep."""
    from factory_train.sweep_report import write_sweep_report

    sweep, record = prepared.sweep, prepared.record
    results = write_sweep_report(sweep)
    print("\n".join(table_lines(results)))
    print(f"{'sweep':<10}  {sweep.name}: {results.headline()}")
    print(f"{'report':<10}  {shown(sweep.report_path)}, {sweep.table_path.name}", flush=True)
    if prepared.drafts[0].request.config.tracking.backend != "none":
        print(f"{'mlflow':<10}  {_send(sweep, received)}")
    unfinished = [draft.point for draft in prepared.drafts if _state(results, draft.point) != DONE]
    if unfinished:
        print(f"{'next':<10}  the same command with sweep={record.id} runs what is not done")
    stopped = any(point.state == NOT_RUN or _state(results, point) in ("interrupted", "preempted", "killed") for point in unfinished)
    if received and stopped:
        return sweep_local.exit_code_of(received[0])
    return max(codes, default=ExitCode.OK)


def _state(results: SweepResults, point: SweepPoint) -> str:
    return next(result.state for result in results.points if result.point.number == point.number)


def _send(sweep: SweepDir, received: Sequence[int]) -> str:
    """Sends to MLflow what is not there yet, the comparison last; returns what came of it.

    In a process of its own: MLflow takes seconds to import, and a tracker that hangs must not keep this command.
    """
    from factory_train.tracking.store import ui_command

    asked = len(received)
    with open(sweep.path / "sync.log", "ab") as log:
        command = [sys.executable, "-m", "factory_train", "sync", sweep.name, f"runs_root={sweep.path.parent}"]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=import_environ(os.environ), start_new_session=True
        )
    limit = time.monotonic() + _SYNC_LIMIT_S
    while process.poll() is None and time.monotonic() < limit and len(received) == asked:
        time.sleep(_POLL_S)
    if process.poll() is None:
        process.terminate()
        process.wait()
    state = storage.read_json(sweep.path / "tracking.json")
    if process.returncode or not state:
        return f"the comparison was not sent ({shown(sweep.path / 'sync.log')}): python -m factory_train sync {sweep.name}"
    return ui_command(state["uri"])
