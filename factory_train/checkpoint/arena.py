"""Host memory that a rank and its writer process share: a save is copied into it and written from there. No torch."""

from __future__ import annotations

import mmap
import os
import tempfile


class Arena:
    """Anonymous shared memory of a fixed size.

    Args:
        fd: its file descriptor; the arena owns it.
        size: bytes.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self.memory = mmap.mmap(fd, size)

    @staticmethod
    def make(size: int) -> Arena:
        """Makes an arena of at least one byte; its pages come into being as they are touched."""
        size = max(1, size)
        fd = _anonymous_file()
        os.ftruncate(fd, size)
        return Arena(fd, size)

    def view(self) -> memoryview:
        """Returns the bytes; nobody may hold a view when the arena is closed."""
        return memoryview(self.memory)

    def close(self) -> None:
        """Gives the memory back."""
        self.memory.close()
        os.close(self.fd)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("factory_train-checkpoint")
    # Elsewhere than on Linux: a file without a name, in the page cache for as long as there is room.
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
