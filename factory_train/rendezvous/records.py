"""Records that islands leave for each other: replaced by their one writer, or written once under a number."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Protocol

from factory_train import storage


class Records(Protocol):
    """Small JSON values by kind.

    Raises:
        OSError: they cannot be reached now; it may be worth another try.
    """

    def replace(self, kind: str, name: str, value: Any) -> None:
        """Puts the value in place of what its writer said before; a crash of the machine may lose it."""
        ...

    def all(self, kind: str) -> dict[str, Any]:
        """Returns the newest value of every writer, by name."""
        ...

    def create(self, kind: str, number: int, value: Any) -> bool:
        """Writes a value for good; False when there is one of that number."""
        ...

    def newest(self, kind: str) -> Any:
        """Returns the value with the highest number; None when there is none."""
        ...


class FolderRecords:
    """Records as files: one folder a kind, one file a record.

    Args:
        folder: need not be there before the first record.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def replace(self, kind: str, name: str, value: Any) -> None:
        """See `Records`."""
        folder = self._folder / kind
        folder.mkdir(parents=True, exist_ok=True)
        storage.replace_json(folder / f"{name}.json", value)

    def all(self, kind: str) -> dict[str, Any]:
        """See `Records`."""
        found = {path.stem: storage.read_json(path) for path in sorted((self._folder / kind).glob("*.json"))}
        return {name: value for name, value in found.items() if value is not None}

    def create(self, kind: str, number: int, value: Any) -> bool:
        """See `Records`; what was written survives a crash of the machine."""
        return storage.write_json_once(self._path(kind, number), value)

    def newest(self, kind: str) -> Any:
        """See `Records`."""
        numbers = self._numbers(kind)
        return storage.read_json(self._path(kind, max(numbers))) if numbers else None

    def at(self, kind: str, number: int) -> Any:
        """Returns the value of a number; None when there is none."""
        return storage.read_json(self._path(kind, number))

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / kind / f"{number:06d}.json"

    def _numbers(self, kind: str) -> list[int]:
        folder = self._folder / kind
        return [int(name[:6]) for name in (os.listdir(folder) if folder.is_dir() else ()) if re.fullmatch(r"\d{6}\.json", name)]
