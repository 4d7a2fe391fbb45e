"""The command line: which verb, and what a failure looks like.

Verbs live in `factory_train.commands`, one module each, and are imported only when asked for. A mistake of the user
is one line and its fix on stderr with a documented exit code; a traceback means a bug of ours.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from factory_train import __version__
from factory_train.errors import ConfigError, ExitCode, FactoryTrainError, PreflightError, did_you_mean

# What each verb does, in the words of --help.
VERBS = {
    "train": "compose, check, plan and train (the default: the word itself may be left out)",
    "status": "what runs there are and how they stand",
    "logs": "a run's log; -f follows it",
    "stop": "save, then end a run",
    "resume": "continue a run from its newest checkpoint",
    "prepare": "text, JSON lines or parquet to token shards, for data.path",
    "evaluate": "measure a run's model on its validation text",
    "generate": "continue a prompt with a run's model",
    "checkpoint": "list, verify, show, diff, prune and mark checkpoints",
    "report": "write a run's report.html and report.md, while it runs too",
    "export": "write a run's model in Hugging Face layout",
    "sync": "send what MLflow has not seen yet",
    "doctor": "look at the environment, the filesystem, the network and the scheduler",
}

_FULL_TRACEBACK = "FACTORY_TRAIN_TRACEBACK"
_DISK_ERRORS = {
    errno.ENOSPC: ("the disk is full", "free some space, or runs_root=FOLDER on another disk"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or runs_root=FOLDER on another disk"),
    errno.EROFS: ("the filesystem is read-only", "runs_root=FOLDER where you may write"),
    errno.EACCES: ("no permission", "runs_root=FOLDER where you may write"),
    errno.EPERM: ("not permitted", "runs_root=FOLDER where you may write"),
}


def console_script() -> None:
    """Entry point of the `factory-train` script and of `python -m factory_train`."""
    sys.exit(main(sys.argv[1:]))


def main(argv: Sequence[str]) -> int:
    """Runs the verb that `argv` names and returns the exit code."""
    try:
        code = _dispatch(list(argv))
        sys.stdout.flush()
        return code
    except FactoryTrainError as error:
        return report(error)
    except SystemExit as end:
        # How argparse ends after -h.
        return end.code if isinstance(end.code, int) else ExitCode.OK
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left (`| head`); flushing at exit must not complain about it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    except OSError as error:
        known = _DISK_ERRORS.get(error.errno or 0)
        if known is None:
            return _report_bug(error)
        return report(PreflightError(known[0], where=str(error.filename) if error.filename else None, fix=known[1]), cause=error)
    except Exception as error:
        return _report_bug(error)


def report(error: FactoryTrainError, *, cause: BaseException | None = None) -> int:
    """Prints an error for its user and returns its exit code."""
    if os.environ.get(_FULL_TRACEBACK):
        traceback.print_exception(cause or error)
    print(f"error: {error}", file=sys.stderr)
    return int(error.exit_code)


def _report_bug(error: Exception) -> int:
    traceback.print_exception(error)
    print(f"error: a bug in factory_train {__version__}: {type(error).__name__}: {error}", file=sys.stderr)
    print("  fix: report it with the lines above", file=sys.stderr)
    return ExitCode.FAILED


def _dispatch(argv: list[str]) -> int:
    verb, rest = split_verb(argv)
    if verb is None:
        if argv[:1] == ["--version"]:
            print(f"factory_train {__version__}")
            return ExitCode.OK
        if not argv or argv[0] in ("--help", "-h", "help"):
            from factory_train.help import overview

            print(overview(VERBS))
            # Nothing asked for is a question, not a mistake.
            return ExitCode.OK
        verb = "train"
    return int(importlib.import_module(f"factory_train.commands.{verb}").main(rest))


def split_verb(argv: list[str]) -> tuple[str | None, list[str]]:
    """Returns the verb, if the first word is one, and the rest.

    Raises:
        ConfigError: the first word is neither a verb, nor `key=value`, nor a flag.
    """
    if not argv or "=" in argv[0] or argv[0].startswith(("-", "~")) or argv[0] == "help":
        return None, argv
    if argv[0] in VERBS:
        return argv[0], argv[1:]
    guess = did_you_mean(argv[0], VERBS)
    fix = f"did you mean {guess}?" if guess else f"verbs: {' '.join(VERBS)}; anything else is key=value"
    raise ConfigError(f"unknown verb '{argv[0]}'", fix=fix)
