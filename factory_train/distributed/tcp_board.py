"""The board served by a launcher over TCP, for islands without a common filesystem or with a slow one."""

from __future__ import annotations

import datetime
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from factory_train.distributed.board import Beat, Board, Epoch, FolderBoard
from factory_train.rendezvous import address
from factory_train.rendezvous.address import Address
from factory_train.rendezvous.client import AwayError, TcpRecords
from factory_train.rendezvous.wire import Introduction

_LOOK_EVERY_S = 0.02


def open_board(folder: Path, rendezvous: str | None) -> Board:
    """Returns the board of a run.

    Args:
        folder: the run's exchange folder.
        rendezvous: diloco.rendezvous.

    Raises:
        ConfigError, PolicyError: the token is not there, or others can read it.
    """
    if rendezvous is None:
        return FolderBoard(folder)
    me = Introduction(address.identity(folder), f"{socket.gethostname()}:{folder.parent}")
    return TcpBoard(TcpRecords(Address.parse(rendezvous), address.read_token(folder), me), FolderBoard(folder))


class TcpBoard(Board):
    """The board that a launcher serves.

    Args:
        records: over TCP.
        own: the board in this run's directory. Where another run's is served, `status` finds there what this island said and saw.
    """

    def __init__(self, records: TcpRecords, own: FolderBoard) -> None:
        super().__init__(records)
        self._tcp, self._own = records, own
        self._seen = 0

    def write_beat(self, beat: Beat) -> None:
        """See `Board`."""
        super().write_beat(beat)
        if not self._tcp.is_own:
            self._own.write_beat(beat)

    def epoch(self) -> Epoch | None:
        """See `Board`."""
        epoch = super().epoch()
        if epoch is not None and epoch.number > self._seen and not self._tcp.is_own:
            self._own.publish(epoch)
            self._seen = epoch.number
        return epoch

    def store(self, epoch: Epoch, rank: int, timeout: datetime.timedelta) -> dist.Store:
        """See `Board`."""
        return RecordsStore(self._tcp, f"{epoch.number:06d}.rank-{rank:05d}", timeout)

    def close(self) -> None:
        """See `Board`."""
        self._tcp.close()


class RecordsStore(dist.Store):
    """Where ranks find each other: what gloo asks of a store, over the connection that is there.

    Args:
        records: see `TcpBoard`.
        place: of this meeting.
        timeout: for what is not there yet, and for a server that is away.
    """

    def __init__(self, records: TcpRecords, place: str, timeout: datetime.timedelta) -> None:
        super().__init__()
        self._records, self._place, self._timeout = records, place, timeout

    def set(self, key: str, value: Any) -> None:
        """Leaves a value.

        Raises:
            RuntimeError: the server stayed away.
        """
        data = value.encode() if isinstance(value, str) else bytes(value)
        limit = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                return self._records.post(self._place, key, data)
            except AwayError as error:
                if time.monotonic() > limit:
                    raise RuntimeError(str(error)) from None
            time.sleep(_LOOK_EVERY_S)

    def get(self, key: str) -> bytes:
        """Returns a value, waiting for it.

        Raises:
            RuntimeError: it did not come in time.
        """
        return self._await([key], self._timeout)[key]

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:
        """Waits for values; see `get`."""
        self._await(keys, timeout or self._timeout)

    def check(self, keys: list[str]) -> bool:
        """Returns whether all of them are there."""
        return len(self._records.read(self._place, keys)) == len(set(keys))

    def _await(self, keys: list[str], timeout: datetime.timedelta) -> dict[str, bytes]:
        limit, why = time.monotonic() + timeout.total_seconds(), "not all members came"
        while True:
            try:
                found = self._records.read(self._place, keys)
                if len(found) == len(set(keys)):
                    return found
            except AwayError as error:
                why = str(error)
            if time.monotonic() > limit:
                raise RuntimeError(f"{why} (within {timeout.total_seconds():g} s, at {self._place})")
            time.sleep(_LOOK_EVERY_S)
