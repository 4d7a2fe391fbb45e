"""Files that are either wholly there or not there at all, on a local or a parallel filesystem."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a JSON-lines file holds back while its disk is full; the oldest rows go first then.
_MAX_WAITING_ROWS = 1_000_000


def fsync_directory(path: Path) -> None:
    """Makes the names inside a directory durable; a file's own fsync does not do that."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_beside(path: Path, data: bytes) -> Path:
    """Writes a durable temporary file in the folder of `path` and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # A full disk must not leave half a file behind.
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replaces `path` by `data`: a reader sees the old bytes or the new ones, never a mix."""
    temporary = _write_beside(path, data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


def replace_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as JSON for readers, without waiting for the disk: after a power cut it may be the old one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def write_json_once(path: Path, value: Any) -> bool:
    """Writes `path` unless somebody already has; returns whether this call wrote it.

    The first writer wins however many race: the complete file is linked to its name in one step.
    """
    temporary = _write_beside(path, (json.dumps(value, indent=2) + "\n").encode())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return True


@contextlib.contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty folder to fill; it takes the place of `folder` when the block ends well, and goes when it does not.

    The caller holds a lock: what another process left behind can then only be of one that died, and is removed.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.tmp-"
    for remains in folder.parent.glob(prefix + "*"):
        shutil.rmtree(remains)
    building = folder.parent / (prefix + secrets.token_hex(4))
    building.mkdir()
    try:
        yield building
        fsync_directory(building)
        if folder.exists():
            # Damaged: out of the way first, since a folder cannot replace another.
            folder.rename(folder.parent / f"{prefix}damaged-{secrets.token_hex(4)}")
        building.rename(folder)
        fsync_directory(folder.parent)
    finally:
        for remains in folder.parent.glob(prefix + "*"):
            shutil.rmtree(remains, ignore_errors=True)


def read_json(path: Path) -> Any:
    """Returns the JSON value in `path`; None when the file is not there."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Appends one row to a JSON-lines file that only the caller's process writes."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


class JsonLinesFile:
    """A JSON-lines file of one writer, whom a full disk neither ends nor makes tear a line.

    Rows that cannot be written are kept and written with the first that can.

    Args:
        path: appended to; made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd: int | None = None
        self._waiting: deque[bytes] = deque(maxlen=_MAX_WAITING_ROWS)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a row; it is there for readers at once, disk permitting."""
        self._waiting.append(json.dumps(row).encode() + b"\n")
        with contextlib.suppress(OSError):
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()

    def close(self) -> None:
        """Closes the file. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, line: bytes) -> None:
        if self._fd is None:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        end = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        except OSError:
            # Half a line would spoil the next one too.
            os.ftruncate(self._fd, end)
            raise


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the complete rows of a JSON-lines file; a last line still being written is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    complete, _, _ = data.rpartition(b"\n")
    return [json.loads(line) for line in complete.splitlines() if line.strip()]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive advisory lock on the file `path`, waiting for whoever has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def is_writable(path: Path) -> bool:
    """Returns whether a file can really be created below `path` (a read-only mount says no to root too)."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    probe = folder / f".write-probe-{secrets.token_hex(4)}"
    try:
        probe.touch()
    except OSError:
        return False
    probe.unlink(missing_ok=True)
    return True


def free_bytes(path: Path) -> int:
    """Returns the bytes an ordinary user can still write on the filesystem that holds `path`."""
    folder = path
    while not folder.exists():
        folder = folder.parent
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
