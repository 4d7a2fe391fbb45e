"""A wire between islands over a gloo group of its own, apart from the process group of the island, with its bytes counted."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from factory_train.distributed.process_group import interface_towards

Parts = Sequence[torch.Tensor]
# A tag that nothing has, and how long it is waited for.
_NEVER_SENT, _AT_ONCE = 1, datetime.timedelta(milliseconds=1)


def listen_where_others_are(store: dist.Store, rank: int, size: int) -> None:
    """Has gloo listen where members on other machines can reach it, unless that is settled; all members call it.

    By itself gloo takes what the host's own name resolves to, which on many machines is a loopback address.

    Args:
        store: where they find each other.
        rank, size: place among them, and their number.

    Raises:
        RuntimeError: not all came within the store's timeout.
    """
    mine = socket.gethostname()
    store.set(f"host/{rank}", mine)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    hosts = [store.get(f"host/{other}").decode() for other in range(size)]
    elsewhere = next((host for host in hosts if host != mine), None)
    name = interface_towards(elsewhere) if elsewhere is not None else None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


class GlooWire:
    """The same rank of all members of an epoch.

    Args:
        store: where they find each other; nobody else uses it.
        rank, size: place among them, and their number.
        timeout: a member that is silent for so long in the middle of a round has failed.
        meet: how long members wait for each other here; `timeout` where it is not given.
        pinned: whether a card copies from and to its rooms.

    Raises:
        RuntimeError: not all came in time.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        timeout: datetime.timedelta,
        meet: datetime.timedelta | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.rank, self.size, self._timeout, self._pinned = rank, size, timeout, pinned
        # What this rank sent to others, in bytes.
        self.bytes_sent = 0
        self._rooms: dict[str, torch.Tensor] = {}
        # Training and the thread of the rounds may close it at the same time.
        self._is_closed, self._closing = False, threading.Lock()
        # The group holds on to its C++ half only; one made in Python must not lose the other.
        self._store = store
        if size > 1:
            store.set_timeout(meet or timeout)
            listen_where_others_are(store, rank, size)
        # Its collectives are there, if not in its type.
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, meet or timeout) if size > 1 else None
        if self._group is not None:
            self._group._set_default_timeout(timeout)

    def all_to_all(self, received: Sequence[Parts], sent: Sequence[Parts], meanwhile: Callable[[], object] = lambda: None) -> None:
        """See `encoded_reduce.Wire`."""
        if (group := self._open()) is None:
            return
        others = [member for member in range(self.size) if member != self.rank]
        # Nothing is copied together: each part goes from where it is to where it is wanted, in their order.
        coming = [group.recv([part], member, 0) for member in others for part in received[member] if part.numel()]
        leaving = [group.send([part], member, 0) for member in others for part in sent[member] if part.numel()]
        meanwhile()
        for work in (*coming, *leaving):
            work.wait(self._timeout)
        self.bytes_sent += sum(part.nbytes for member in others for part in sent[member])

    def all_gather(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        """See `encoded_reduce.Wire`."""
        if (group := self._open()) is None:
            received[0].copy_(sent)
            return
        group._allgather_base(received.view(-1), sent).wait()
        self.bytes_sent += sent.nbytes * (self.size - 1)

    def room(self, what: str, size: int) -> torch.Tensor:
        """See `encoded_reduce.Wire`; fresh memory costs more than what is done with it."""
        held = self._rooms.get(what)
        if held is None or held.numel() < size:
            held = self._rooms[what] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        return held[:size]

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Sends a tensor to one member, who calls `receive`."""
        self._open().send([tensor], to, 0).wait()
        self.bytes_sent += tensor.nbytes

    def receive(self, tensor: torch.Tensor, sender: int) -> None:
        """Fills a tensor with what `sender` sent."""
        self._open().recv([tensor], sender, 0).wait()

    def close(self) -> None:
        """Ends the group: members that wait for this one find out at once, and so does who still uses it here. May be called twice."""
        with self._closing:
            self._is_closed = True
            group, self._group = self._group, None
        if group is None:
            return
        # Who waits on this side is not woken by `abort`, but by any operation of the group that runs out of time. One with a member
        # that has closed its own wire fails before it could: there is none left only when all connections are closed, which wakes, too.
        for member in range(self.size):
            if member != self.rank:
                with contextlib.suppress(RuntimeError):
                    group.recv([torch.empty(1, dtype=torch.uint8)], member, _NEVER_SENT).wait(_AT_ONCE)
        with contextlib.suppress(RuntimeError):
            group.abort()

    def _open(self) -> Any:
        """Returns the group; None where there is only this member.

        Raises:
            RuntimeError: the wire was closed.
        """
        group = self._group
        if self._is_closed:
            raise RuntimeError("the wire is closed")
        return group
