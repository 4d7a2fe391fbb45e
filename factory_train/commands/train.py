"""`train`, the verb that may be left out: compose, check, plan, start, follow."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from factory_train import hydra_app
from factory_train.commands import submission
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.follow import follow, passing_on_signals
from factory_train.commands.submission import Request
from factory_train.commands.summary import next_commands, shown
from factory_train.compose import Composition, compose_run, differences
from factory_train.config import Config
from factory_train.errors import ConfigError, ExitCode
from factory_train.run_dir import RunDir

_EPILOG = """examples:
  python -m factory_train recipe=llama_fsdp
  python -m factory_train recipe=llama_ddp data.path=book.txt train.steps=2000 run=book
  python -m factory_train recipe=llama_fsdp --multirun optim.lr=1e-3,3e-3 sweep=lr

python -m factory_train --help lists every group and key."""


def main(argv: list[str]) -> int:
    """Trains, and returns the exit code of the run; of several runs, the worst."""
    parser = ArgumentParser("train", "Composes a run, checks and plans it, starts it, and follows it to its end.", _EPILOG)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="group=option and key=value, in Hydra's grammar; recipe= is needed"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the plan and what would be started; write nothing")
    parser.add_argument("--force", action="store_true", help="continue a run although keys changed that it was trained with; recorded")
    parser.add_argument("--multirun", "-m", action="store_true", help="a sweep: one run for every combination of comma-separated values")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="your own recipes and groups, beside the package's")
    if hydra_app.is_for_hydra(argv):
        return hydra_app.run(argv)
    arguments = parser.parse(argv)
    if arguments.multirun:
        from factory_train.commands import sweep, sweep_slurm

        return sweep.main(
            arguments.overrides,
            argv,
            arguments.config_dir,
            force=arguments.force,
            dry_run=arguments.dry_run,
            # An array has one script for all its points.
            show=lambda draft: _dry_run(draft.request, draft.composition, script=not sweep_slurm.is_meant([draft])),
        )
    composition = compose_run(arguments.overrides, arguments.config_dir)
    if composition.config.sweep is not None:
        raise ConfigError("it names a sweep, and this is one run", where="sweep", fix="--multirun (-m), or run=NAME for one run")
    request = submission.check_request(composition.config, argv, force=arguments.force, dry_run=arguments.dry_run)
    return _dry_run(request, composition) if arguments.dry_run else carry_out(request).exit_code


@dataclass(frozen=True)
class Outcome:
    """What became of a request: the exit code, and the run it was about."""

    exit_code: int
    run: RunDir


def carry_out(request: Request) -> Outcome:
    """Shows the plan of a request, starts it and follows it to its end."""
    _show_plan(request)
    # What comes next may take a while; a pipe or a log file should show the plan before it.
    sys.stdout.flush()
    with passing_on_signals() as received:
        started = submission.start(request)
        if started is not None:
            run = started.attempt.run
            print(f"{'run':<10}  {run.name}   {shown(run.path)}   attempt {started.attempt.number}", flush=True)
            if request.config.wait:
                return Outcome(follow(started, received), run)
    if started is None:
        assert request.run is not None
        print(f"run '{request.run.name}' is finished: nothing left to do")
        print(f"  to train on: python -m factory_train resume {request.run.name} train.steps={2 * request.config.train.steps}")
        return Outcome(ExitCode.OK, request.run)
    for index, words in enumerate(next_commands(run)):
        print(f"{'' if index else 'next':<10}  {words}")
    return Outcome(ExitCode.OK, run)


def show_dry_run(request: Request, against: str, base: Config, choices: Sequence[str] = (), *, script: bool = True) -> int:
    """Tells what would be started, unless `script` is off, and which keys differ from `base`; returns the exit code."""
    _show_plan(request)
    changes = differences(request.config, base)
    print(f"{'changes':<10}  against {against}:{'' if changes or choices else ' none'}")
    for choice in choices:
        print(f"  {choice}")
    for key, (old, new) in changes.items():
        print(f"  {key}: {_yaml(old)} -> {_yaml(new)}")
    if submission.is_finished(request):
        print(f"{'start':<10}  nothing: the run has done all its steps")
    elif script:
        print(f"{'start':<10}  {submission.describe(request)}")
    return ExitCode.OK


def _dry_run(request: Request, composition: Composition, *, script: bool = True) -> int:
    last = request.run.last_attempt() if request.run else None
    if last is not None:
        return show_dry_run(request, f"attempt {last.number} of {last.run.name}", last.config(), script=script)
    return show_dry_run(request, f"recipe={request.config.recipe}", composition.groups_only, composition.choices, script=script)


def _show_plan(request: Request) -> None:
    print(f"{'launcher':<10}  {request.launcher_reason}")
    print("\n".join(request.plan.lines()))


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
