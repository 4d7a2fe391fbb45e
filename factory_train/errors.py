"""What can go wrong for a user, and the exit code that says so."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every verb; stable, documented in README.md."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PREFLIGHT = 3
    NOT_FOUND = 4
    GATE_REFUSED = 5
    INTEGRITY = 6
    UNAVAILABLE = 69
    PREEMPTED = 75
    POLICY_REFUSED = 77
    INTERRUPTED = 130


class FactoryTrainError(Exception):
    """An error whose message is for the user: what happened, where, and what would fix it.

    Args:
        what: one sentence, lower case, no final full stop.
        where: the key, file or process it is about.
        fix: the exact override or command that would mend it.
    """

    exit_code: ExitCode = ExitCode.FAILED
    # Mistakes of the person who wrote the command are never retried by a scheduler.
    by_user: bool = False

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ConfigError(FactoryTrainError):
    """A key, a value, or a combination of values that cannot be right."""

    exit_code = ExitCode.USAGE
    by_user = True


class DataError(FactoryTrainError):
    """Training data that is missing, unreadable, or too small."""

    exit_code = ExitCode.USAGE
    by_user = True


class PreflightError(FactoryTrainError):
    """The request is well formed but this machine cannot carry it out as it stands."""

    exit_code = ExitCode.PREFLIGHT
    by_user = True


class OutOfMemoryError(FactoryTrainError):
    """Memory that ran out while training: the same run on the same devices would run out again."""

    exit_code = ExitCode.PREFLIGHT
    by_user = True


class NotFoundError(FactoryTrainError):
    """A run, checkpoint or file that is not there."""

    exit_code = ExitCode.NOT_FOUND
    by_user = True


class IntegrityError(FactoryTrainError):
    """Bytes on disk that differ from what their manifest says."""

    exit_code = ExitCode.INTEGRITY


class CheckpointError(FactoryTrainError):
    """A checkpoint that could not be written; what was there before it is untouched."""


class UnavailableError(FactoryTrainError):
    """A scheduler or tracking server that does not answer."""

    exit_code = ExitCode.UNAVAILABLE


class PolicyError(FactoryTrainError):
    """A limit or rule of the site that the request would break."""

    exit_code = ExitCode.POLICY_REFUSED
    by_user = True


class DivergenceError(FactoryTrainError):
    """Training that no longer produces finite numbers; the same run would diverge again."""

    by_user = True


class FencedError(FactoryTrainError):
    """This attempt was superseded by a newer one and may write nothing more."""


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """Returns the known word closest to `word`, or None when nothing is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close and "." not in word:
        # A bare key ("lr") is most often the last part of a dotted one ("optim.lr").
        close = [name for name in known if name.rpartition(".")[2] == word][:1]
    return close[0] if close else None
