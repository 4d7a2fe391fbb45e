"""What a person asks of `prepare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# Text that is held out beyond this would only be stored: a validation of a few thousand rows is read from its start.
_MOST_HELD_OUT_BYTES = 50_000_000
_HELD_OUT = 0.05


@dataclass(frozen=True)
class Request:
    """All that decides what the shards hold, apart from the files and the tokenizer.

    Args:
        field: of JSON lines, and column of parquet; dots lead inwards.
        by_line: each line of a text file is a document; else a file is one.
        validation_fraction: part that is held out.
        skip_malformed: count malformed documents instead of stopping at the first.
    """

    field: str
    by_line: bool
    validation_fraction: float
    skip_malformed: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def default_validation_fraction(num_bytes: int) -> float:
    """Returns what is held out of a corpus of this size if nobody says: a twentieth, but not more than 50 MB."""
    return min(_HELD_OUT, _MOST_HELD_OUT_BYTES / max(1, num_bytes))
