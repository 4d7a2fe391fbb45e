"""The schema as data: type, default and section of every key of `Config`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from factory_train.config import Config


@dataclass(frozen=True)
class Leaf:
    """Type and default of one key of the schema, and for a list or a mapping from names the type of its items."""

    type: type
    optional: bool
    default: Any
    item: Any = str


@dataclass(frozen=True)
class Section:
    """One dataclass of the schema and whether null may stand in its place."""

    type: type
    optional: bool


@cache
def _schema() -> tuple[dict[str, Leaf], dict[str, Section]]:
    leaves: dict[str, Leaf] = {}
    sections: dict[str, Section] = {}

    def walk(owner: Any, prefix: str) -> None:
        hints = get_type_hints(owner)
        for item in fields(owner):
            name, hint = prefix + item.name, hints[item.name]
            container = get_origin(hint) if get_origin(hint) in (list, dict) else None
            parts = [part for part in get_args(hint) if part is not type(None)]
            kind, optional = (container, False) if container else (parts[0], True) if parts else (hint, False)
            if isinstance(kind, type) and is_dataclass(kind):
                sections[name] = Section(kind, optional)
                walk(kind, name + ".")
            else:
                default = item.default if item.default_factory is MISSING else item.default_factory()
                leaves[name] = Leaf(kind, optional, default, parts[-1] if container else str)

    walk(Config, "")
    return leaves, sections


def leaves() -> dict[str, Leaf]:
    """Returns type and default of every key of the schema."""
    return _schema()[0]


def sections() -> dict[str, Section]:
    """Returns the sections of the schema by dotted name."""
    return _schema()[1]
