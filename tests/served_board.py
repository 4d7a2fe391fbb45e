"""A board over TCP as a launcher serves it, for tests."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from factory_train.rendezvous.address import Address, identity, keep_token, read_token
from factory_train.rendezvous.records import FolderRecords
from factory_train.rendezvous.server import RecordsServer
from factory_train.rendezvous.wire import Introduction


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def served(folder: Path, port: int) -> Iterator[str]:
    """Serves an exchange folder; yields what islands are told."""
    keep_token(folder, {})
    me = Introduction(identity(folder), str(folder))
    running = RecordsServer(Address("127.0.0.1", port), FolderRecords(folder), read_token(folder), me)
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        running.close()
