"""Who reads a checkpoint, so that retention does not remove it under their hands. No torch.

A reader holds a shared lock on MANIFEST.json for as long as it reads; whoever removes a checkpoint takes the exclusive
one first, and leaves it for the next time where it cannot have it. The locks are flock(2): they work between nodes on
NFS, GPFS and on Lustre mounted with `flock`, and end with the process. Where a filesystem has none, a reader still
keeps its files open, and finds a checkpoint that goes before that missing.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from factory_train.checkpoint.format import MANIFEST_NAME
from factory_train.errors import IntegrityError, NotFoundError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lease:
    """A shared or exclusive hold on a checkpoint folder; it ends with `close` or with the process."""

    def __init__(self, fd: int) -> None:
        self._fd: int | None = fd

    @staticmethod
    def to_read(path: Path) -> Lease:
        """Holds a checkpoint for reading.

        Raises:
            NotFoundError: it is being removed.
            IntegrityError: it has no manifest.
        """
        manifest = path / MANIFEST_NAME
        try:
            lease = Lease(os.open(manifest, os.O_RDONLY))
        except FileNotFoundError as error:
            if not path.is_dir():
                raise NotFoundError("no checkpoint here", where=str(path)) from error
            raise IntegrityError("cannot read the manifest: it is missing", where=str(manifest)) from error
        except OSError as error:
            raise IntegrityError(f"cannot read the manifest ({error.strerror})", where=str(manifest)) from error
        if not lease._take(fcntl.LOCK_SH) or not lease._is_still(manifest):
            lease.close()
            raise NotFoundError("this checkpoint is being removed", where=str(path))
        return lease

    @staticmethod
    def to_remove(path: Path) -> Lease | None:
        """Holds a checkpoint against all readers; None while somebody reads it.

        Raises:
            OSError: its manifest cannot be opened.
        """
        lease = Lease(os.open(path / MANIFEST_NAME, os.O_RDWR))
        if lease._take(fcntl.LOCK_EX):
            return lease
        lease.close()
        return None

    def close(self) -> None:
        """Lets go. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        self.close()

    def _take(self, kind: int) -> bool:
        assert self._fd is not None
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _is_still(self, manifest: Path) -> bool:
        """Returns whether the file that was locked is still the one of that name: removal begins with a rename."""
        assert self._fd is not None
        try:
            there, here = os.stat(manifest), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)
