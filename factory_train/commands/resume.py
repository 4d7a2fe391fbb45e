"""`resume RUN [key=value ...]`: a new attempt of a run, from its newest checkpoint and its frozen configuration."""

from __future__ import annotations

import dataclasses

from factory_train.commands import submission
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.train import carry_out, show_dry_run
from factory_train.compose import apply_overrides
from factory_train.errors import ConfigError
from factory_train.runs_index import find_run, runs_root


def main(argv: list[str]) -> int:
    """Resumes a run and returns the exit code of its new attempt."""
    parser = ArgumentParser(
        "resume", "Continues a run from its newest checkpoint, as the same run.", "example: resume 7k2m9x train.steps=2000"
    )
    parser.add_argument("run", metavar="RUN", nargs="?", help="any unique part of a run's name, or its folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes; keys the model was trained with need --force")
    parser.add_argument("--force", action="store_true", help="change keys the model was trained with; recorded")
    parser.add_argument("--dry-run", action="store_true", help="show the plan and start nothing")
    parser.add_argument("--config-dir", "-cd", metavar="DIR", help="your own recipes and groups")
    arguments = parser.parse(argv)
    if arguments.run is None or "=" in arguments.run:
        raise ConfigError("which run?", where="resume", fix="python -m factory_train resume RUN; status lists the runs")
    elsewhere = next((word.removeprefix("runs_root=") for word in arguments.overrides if word.startswith("runs_root=")), None)
    run = submission.open_run(find_run(arguments.run, runs_root(elsewhere)).path)
    last = run.last_attempt()
    assert last is not None
    # Waiting belongs to the command, not to the run.
    frozen = dataclasses.replace(last.config(), wait=None)
    config = apply_overrides(frozen, arguments.overrides, arguments.config_dir)
    request = submission.check_request(config, ["resume", *argv], run=run, force=arguments.force, dry_run=arguments.dry_run)
    if arguments.dry_run:
        return show_dry_run(request, f"attempt {last.number} of {run.name}", frozen)
    return carry_out(request).exit_code
