"""How a key of the configuration is declared."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str, *, choices: tuple[str, ...] = (), safe: bool = False) -> Any:
    """Declares a key: its default, its help line, its allowed words, and whether a resumed run may change it."""
    metadata = {"help": help, "choices": choices, "safe": safe}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
