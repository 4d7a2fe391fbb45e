"""Which islands reach each other over the network, whatever the board says: asked where a round failed, and before an island joins.

Each island listens on a port for hails, and answers with its name. Nothing else is ever said there.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

_MOST_AT_ONCE = 8
_LONGEST_NAME = 256


class Reach:
    """One island's.

    Args:
        name: what it answers.
        hail_s: an island that does not answer in this time cannot be reached.
    """

    def __init__(self, name: str, hail_s: float) -> None:
        self._name, self._hail_s = name.encode(), hail_s
        host, known_as = _host()
        self._server = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        # Where the others hail this island.
        self.address = f"{known_as}:{self._server.getsockname()[1]}"
        self._pool = ThreadPoolExecutor(_MOST_AT_ONCE, "diloco-hail")
        self._asked: dict[str, Future[bool]] | None = None
        self._answered: tuple[str, ...] | None = None
        threading.Thread(target=self._serve, name="diloco-reach", daemon=True).start()

    def look(self, others: Mapping[str, str]) -> tuple[str, ...] | None:
        """Returns who answered when all were last asked, and asks again; None before the first answers. Never waits.

        Args:
            others: address of each island by its name.
        """
        if self._asked is not None and all(asked.done() for asked in self._asked.values()):
            self._answered = tuple(sorted(name for name, asked in self._asked.items() if asked.result()))
            self._asked = None
        if self._asked is None:
            self._asked = {name: self._pool.submit(self.hail, name, address) for name, address in others.items()}
        return self._answered

    def forget(self) -> None:
        """Drops what was answered before now."""
        self._asked = self._answered = None

    def hail(self, name: str, address: str) -> bool:
        """Returns whether the island `name` answers at an address."""
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), self._hail_s) as connection:
            return connection.recv(_LONGEST_NAME) == name.encode()
        return False

    def close(self) -> None:
        """Answers no more. May be called twice."""
        # Closing alone would not wake the thread that waits for the next hail.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                connection.sendall(self._name)


def _host() -> tuple[str, str]:
    """Returns the address that gloo listens on, that of its interface or what the machine's name means, and what others call it.

    Where the name means a loopback address here, it may mean another one elsewhere.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface is None:
        with contextlib.suppress(OSError):
            address = socket.gethostbyname(socket.gethostname())
            return ("0.0.0.0", socket.gethostname()) if ipaddress.ip_address(address).is_loopback else (address, address)
        return "127.0.0.1", "127.0.0.1"
    import psutil

    found = psutil.net_if_addrs().get(interface.split(",")[0], ())
    addresses = [item.address for family in (socket.AF_INET, socket.AF_INET6) for item in found if item.family == family]
    address = next(iter(addresses), "127.0.0.1")
    return address, address
