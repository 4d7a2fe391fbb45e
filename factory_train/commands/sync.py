"""`sync [RUN]`: send to MLflow what it has not seen yet."""

from __future__ import annotations

import sys

from factory_train.commands.arguments import ArgumentParser
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, did_you_mean
from factory_train.run_dir import RunDir
from factory_train.runs_index import all_runs, find_run, runs_root
from factory_train.sweep import SweepDir, all_sweeps, find_sweep
from factory_train.sweep_report import write_sweep_report
from factory_train.tracking.facts import read_facts
from factory_train.tracking.store import default_uri, ui_command, without_credentials
from factory_train.tracking.sweeps import first_config, send_sweep
from factory_train.tracking.sync import sync

_KEYS = ("runs_root", "tracking.uri")
_EPILOG = """\
A run that is training sends by itself. This is for runs that could not: no network, a server that was down,
tracking=none. Sending twice changes nothing.

  python -m factory_train sync                              every run of the runs root
  python -m factory_train sync k3xq7f                       one run, by any unique end of its name
  python -m factory_train sync k3xq7f tracking.uri=URI      to another MLflow than the run was made for
"""


def main(argv: list[str]) -> int:
    """Sends one run, or every run of the runs root; returns the exit code.

    Raises:
        ConfigError: words that are not understood.
        NotFoundError: there is no such run.
        UnavailableError: the tracker does not answer, when one run was named.
    """
    parser = ArgumentParser("sync", "Send to MLflow what it has not seen yet.", _EPILOG)
    parser.add_argument(
        "words", nargs="*", metavar="RUN | SWEEP | key=value", help=f"a run, or a sweep with all of its runs; keys: {', '.join(_KEYS)}"
    )
    names, settings = _split(parser.parse(argv).words)
    root, uri = runs_root(settings.get("runs_root")), settings.get("tracking.uri")
    if names:
        sweep = find_sweep(root, names[0])
        if sweep is None:
            print(_send(find_run(names[0], root), uri))
            return ExitCode.OK
        for point in sweep.record().points:
            if run := sweep.run(point):
                print(_send(run, uri))
        print(_send_sweep(sweep, uri))
        return ExitCode.OK
    worst, runs = ExitCode.OK, all_runs(root)
    if not runs:
        print(f"no runs in {root}")
    for run in runs:
        try:
            started = run.last_attempt() is not None
            if not started or (uri is None and read_facts(run).config.tracking.backend == "none"):
                print(f"{run.name}: {'tracking is off' if started else 'never started'}, nothing sent")
                continue
            print(_send(run, uri))
        except FactoryTrainError as error:
            # One run that cannot be sent does not keep the others back.
            print(f"error: {run.name}: {error}", file=sys.stderr)
            worst = max(worst, error.exit_code)
    for sweep in all_sweeps(root):
        try:
            print(_send_sweep(sweep, uri))
        except FactoryTrainError as error:
            print(f"error: {sweep.name}: {error}", file=sys.stderr)
            worst = max(worst, error.exit_code)
    return worst


def _split(words: list[str]) -> tuple[list[str], dict[str, str]]:
    settings = dict(word.split("=", 1) for word in words if "=" in word)
    for key in settings:
        if key not in _KEYS:
            guess = did_you_mean(key, _KEYS)
            raise ConfigError(
                f"sync does not take '{key}'", fix=f"did you mean {guess}={settings[key]}?" if guess else f"keys: {', '.join(_KEYS)}"
            )
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise ConfigError(f"sync takes one run, not {len(names)}", fix="python -m factory_train sync sends every run")
    return names, settings


def _send(run: RunDir, uri: str | None) -> str:
    """Sends one run and returns what happened, for a person."""
    result = sync(run, uri=uri)
    state = result.state
    parts = [f"{result.rows:,} new rows ({state.rows_sent:,} in all)"]
    if result.skipped:
        parts.append(f"{result.skipped:,} values left out (not finite)")
    if state.registered_model:
        parts.append(f"model {state.registered_model} version {state.registered_version}")
    lines = [f"{run.name}: " + ", ".join(parts)]
    lines.append(f"  {without_credentials(result.uri)}  experiment {state.experiment}  run {state.mlflow_run_id}")
    lines.append(f"  look: {ui_command(result.uri)}")
    return "\n".join(lines)


def _send_sweep(sweep: SweepDir, uri: str | None) -> str:
    """Sends what compares the points of a sweep and returns what happened, for a person."""
    config = first_config(sweep)
    if config is None or (uri is None and config.tracking.backend == "none"):
        return f"{sweep.name}: {'tracking is off' if config else 'no point was started'}, nothing sent"
    uri = uri or config.tracking.uri or default_uri(sweep.path.parent)
    if sweep.record().ended is None:
        # Nobody waited for its points to compare them: a scheduler ran them.
        write_sweep_report(sweep)
    run_id = send_sweep(sweep, uri, config.tracking.experiment)
    return f"{sweep.name}: the comparison of its points\n  {without_credentials(uri)}  run {run_id}"
