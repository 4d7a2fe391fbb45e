"""`stop RUN`: save and stop a running job from another terminal."""

from __future__ import annotations

from pathlib import Path

from factory_train import storage
from factory_train.commands.arguments import ArgumentParser
from factory_train.commands.run_words import add_words, the_run
from factory_train.errors import ConfigError
from factory_train.launchers.by_name import is_alive, launcher_named

_REPORT_EVERY_S = 5.0


def main(argv: list[str]) -> int:
    """Stops a run and waits until it has; returns 0.

    Raises:
        NotFoundError: there is no such run.
        ConfigError: the folder is a copy of that of a running job.
        UnavailableError: its job cannot be reached from here.
    """
    parser = ArgumentParser("stop", "Asks a run to save and stop, and waits for it.")
    add_words(parser)
    parser.add_argument("--now", action="store_true", help="end it without saving")
    arguments = parser.parse(argv)
    run, _ = the_run("stop", arguments.words)
    attempt = run.last_attempt()
    if attempt is None or not is_alive(run):
        verdict = attempt.verdict() if attempt else None
        print(f"{run.name} is not running" + (f": {verdict.outcome}, {verdict.reason}" if verdict else ""))
        return 0
    job = storage.read_json(attempt.job_path)
    home = Path(job["run_dir"])
    if not (home.is_dir() and run.path.samefile(home)):
        raise ConfigError(
            "this is a copy; the run itself goes on elsewhere",
            where=str(run.path),
            fix=f"stop {home}" + (f" on {job['host']}" if "host" in job else ""),
        )
    handle = launcher_named(job["launcher"]).attach(job)
    print(f"{run.name}: {'ending without saving' if arguments.now else 'saving, then stopping'}", flush=True)
    handle.cancel(now=arguments.now)
    while not handle.wait(_REPORT_EVERY_S):
        print(f"{run.name}: still stopping", flush=True)
    verdict = (run.last_attempt() or attempt).verdict()
    print(f"{run.name}: {verdict.outcome}: {verdict.reason}" if verdict else f"{run.name}: ended without a verdict")
    if verdict is None or verdict.outcome != "done":
        print(f"  to go on: python -m factory_train resume {run.name}")
    return 0
