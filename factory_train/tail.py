"""Reading the ends of files that another process is still writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16


class Follower:
    """Returns what a growing file gained since the last call; a file that is not there yet is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> bytes:
        """Returns the new bytes."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data

    def rows(self) -> list[dict[str, Any]]:
        """Returns the new complete rows of a JSON-lines file; a line still being written waits for the next call."""
        data = self.read()
        complete, newline, rest = data.rpartition(b"\n")
        self._offset -= len(rest) if newline else len(data)
        return [json.loads(line) for line in complete.splitlines() if line.strip()]


def lines_backwards(path: Path, max_bytes: int | None = None) -> Iterator[bytes]:
    """Yields the complete lines of a file, last first, reading no more of it than the caller asks for.

    Args:
        path: the file; one that is not there has no lines.
        max_bytes: give up this far from the end.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed by the with below; only opening may fail quietly)
    except FileNotFoundError:
        return
    with file:
        position = file.seek(0, os.SEEK_END)
        stop = max(0, position - max_bytes) if max_bytes is not None else 0
        text, complete = b"", False
        while position > stop:
            start = max(stop, position - _BLOCK_BYTES)
            file.seek(start)
            text = file.read(position - start) + text
            position = start
            if not complete:
                # What follows the last newline is still being written.
                text, newline, unfinished = text.rpartition(b"\n")
                if not newline:
                    text = unfinished
                    continue
                complete = True
            text, *lines = text.split(b"\n")
            yield from reversed(lines)
        if complete and stop == 0:
            yield text


def rows_backwards(path: Path, max_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields the complete rows of a JSON-lines file, last first; see `lines_backwards`."""
    for line in lines_backwards(path, max_bytes):
        if line.strip():
            yield json.loads(line)


def first_row(path: Path) -> dict[str, Any] | None:
    """Returns the first row of a JSON-lines file, if it is complete."""
    try:
        with open(path, "rb") as file:
            line = file.readline()
    except FileNotFoundError:
        return None
    return json.loads(line) if line.endswith(b"\n") else None


def last_lines(path: Path, count: int, max_bytes: int = _BLOCK_BYTES) -> list[str]:
    """Returns the last `count` lines of a text file, the unfinished one included."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - max_bytes))
            data = file.read()
    except OSError:
        return []
    return data.decode(errors="replace").splitlines()[-count:]
