"""An error on its way from one process to another: as JSON, never as a pickle. No torch."""

from __future__ import annotations

import errno
from typing import Any

from factory_train.errors import CheckpointError, ConfigError, FactoryTrainError, FencedError, IntegrityError, NotFoundError

_TYPES = {kind.__name__: kind for kind in (CheckpointError, ConfigError, FencedError, IntegrityError, NotFoundError)}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def describe(error: Exception, doing: str, rank: int) -> dict[str, Any]:
    """Returns an error as JSON values.

    Args:
        doing: what was being done, for the message.
        rank: where.
    """
    if isinstance(error, FactoryTrainError):
        kind = next((name for name, cls in _TYPES.items() if isinstance(error, cls)), CheckpointError.__name__)
        return {"type": kind, "what": error.what, "where": error.where, "fix": error.fix}
    if isinstance(error, OSError):
        where = str(error.filename) if error.filename else f"rank {rank}"
        fix = "free space on that filesystem" if error.errno in _NO_ROOM else None
        what = f"{doing} failed on rank {rank}: {error.strerror or error}"
        return {"type": CheckpointError.__name__, "what": what, "where": where, "fix": fix}
    what = f"{doing} failed on rank {rank}: {type(error).__name__}: {error}"
    return {"type": CheckpointError.__name__, "what": what, "where": None, "fix": None}


def rebuild(failure: dict[str, Any], count: int = 1) -> FactoryTrainError:
    """Returns the error that `describe` put into words.

    Args:
        count: on how many ranks there was one.
    """
    what = failure["what"] + (f" (and {count - 1} more ranks failed)" if count > 1 else "")
    return _TYPES[failure["type"]](what, where=failure["where"], fix=failure["fix"])
