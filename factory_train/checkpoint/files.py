"""Every step that changes the filesystem during a save, in one place, so that a test can stop before or after each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import Literal

from factory_train import storage

# Called as hook(when, action, path); raising from it stops the save at that point.
Hook = Callable[[Literal["before", "after"], str, Path], None]


class NewFile:
    """A file being written; its bytes are durable once `DurableFiles.create` has returned."""

    def __init__(self, files: DurableFiles, path: Path, file: RawIOBase) -> None:
        self._files, self._path, self._file = files, path, file

    def write(self, data: bytes | memoryview) -> None:
        """Appends `data` and hands it to the operating system."""
        with self._files.step("write", self._path):
            rest = memoryview(data)
            while rest:
                # The kernel takes less than was asked for when the disk fills up, and says why at the next call.
                rest = rest[self._file.write(rest) or 0 :]


class DurableFiles:
    """The operations a save is made of; none replaces a file, except `point`, whose files are hints.

    Args:
        hook: called before and after every operation.
    """

    def __init__(self, hook: Hook | None = None) -> None:
        self._hook = hook

    @contextlib.contextmanager
    def step(self, action: str, path: Path) -> Iterator[None]:
        """Surrounds one operation with the hook."""
        if self._hook:
            self._hook("before", action, path)
        yield
        if self._hook:
            self._hook("after", action, path)

    def ensure_folder(self, path: Path) -> None:
        """Creates a folder if it is not there yet."""
        with self.step("mkdir", path):
            path.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator[NewFile]:
        """Creates a file that is not there yet; its bytes are durable on leaving, its name after `sync_folder`."""
        with self.step("create", path):
            file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed below; the hook must see creation alone)
        with file:
            yield NewFile(self, path, file)
            with self.step("fsync", path):
                os.fsync(file.fileno())

    def write(self, path: Path, data: bytes) -> None:
        """Creates a file that holds `data`."""
        with self.create(path) as file:
            file.write(data)

    def sync_folder(self, path: Path) -> None:
        """Makes the names in a folder durable."""
        with self.step("fsync folder", path):
            storage.fsync_directory(path)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a folder its final name; fails if something is there."""
        with self.step("rename", target):
            source.rename(target)

    def point(self, pointer: Path, name: str) -> None:
        """Replaces the one-line file `pointer`: a reader sees the old line or the new one."""
        with self.step("point", pointer):
            storage.write_atomic(pointer, name + "\n")

    def remove_file(self, path: Path) -> None:
        with self.step("unlink", path):
            path.unlink()

    def remove_folder(self, path: Path) -> None:
        """Removes a folder of files."""
        for entry in sorted(path.iterdir()):
            self.remove_file(entry)
        with self.step("rmdir", path):
            path.rmdir()
