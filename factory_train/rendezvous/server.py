"""Serves the records of a folder to islands that know the token; a thread of a launcher, and no service of its own.

Epochs and leases are files below the run directory, so a server that starts again goes on with the same ones. What ranks tell
each other to meet is kept in memory: after a restart they meet anew, in the next epoch.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from typing import Any

from factory_train.rendezvous.address import Address
from factory_train.rendezvous.records import FolderRecords
from factory_train.rendezvous.wire import Channel, ForeignError, Introduction, OtherVersionError, WrongTokenError, welcome

_REPLACED = ("beats", "stops")
_NUMBERED = ("leases", "epochs")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PLACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBERS = 1_000_000
# So long a stranger has to show the token, and anybody to take an answer.
_PATIENCE_S = 10.0
_REST_S = 0.1
# Connections at once: of strangers, and of all.
_MOST_STRANGERS = 64
_MOST_CONNECTIONS = 4096
# Meetings that are remembered, the newest.
_MOST_PLACES = 4096


class RecordsServer:
    """Listens until it is closed.

    Args:
        address: to bind; nothing else is listened at.
        records: what is served.
        token: who knows it may read and write.
        me: the run directory of the records.

    Raises:
        OSError: it cannot be bound: not an address of this machine, or in use.
    """

    def __init__(self, address: Address, records: FolderRecords, token: bytes, me: Introduction) -> None:
        self._records, self._token, self._me = records, token, me
        self._lock = threading.Lock()
        self._writers: dict[str, dict[str, str]] = records.all("writers")
        self._places: dict[str, dict[str, str]] = {}
        self._connections: set[socket.socket] = set()
        self._strangers = 0
        self._is_closed = False
        family, _, _, _, where = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server(where[:2], family=family)
        self._thread = threading.Thread(target=self._accept, name="rendezvous", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens at."""
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Stops listening and ends all connections. May be called twice."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        # A thread inside of accept or recv wakes up from a shutdown alone, not from a close.
        for connection in (self._socket, *connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                # Closed, or out of file descriptors for a moment.
                if not self._is_closed:
                    time.sleep(_REST_S)
                continue
            with self._lock:
                fits = not self._is_closed and self._strangers < _MOST_STRANGERS and len(self._connections) < _MOST_CONNECTIONS
                if fits:
                    self._connections.add(connection)
                    self._strangers += 1
            if fits:
                threading.Thread(target=self._serve, args=(connection,), name="rendezvous-connection", daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            them = self._welcome(connection)
            channel = Channel(connection)
            while them is not None:
                asked = channel.receive(None)
                channel.send(self._answer(asked, them), _PATIENCE_S)
        except (OSError, ForeignError, ValueError):
            # Whoever sends what nobody should be sent is not talked to any more.
            return
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _welcome(self, connection: socket.socket) -> Introduction | None:
        """Returns who has come; None for somebody who has no business here."""
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return welcome(Channel(connection), self._token, self._me, _PATIENCE_S)
        except (WrongTokenError, OtherVersionError):
            return None
        finally:
            with self._lock:
                self._strangers -= 1

    def _answer(self, asked: dict[str, Any], them: Introduction) -> dict[str, Any]:
        try:
            return {"value": self._do(asked, them)}
        except OSError as error:
            return {"failed": f"the records cannot be reached: {error}"}
        except _TakenError as error:
            return {"taken": str(error)}

    def _do(self, asked: dict[str, Any], them: Introduction) -> Any:
        """Carries out what is asked.

        Raises:
            ValueError: nobody of ours asks for that.
        """
        match asked:
            case {"do": "replace", "kind": kind, "name": str(name), "value": value} if kind in _REPLACED and _NAME.fullmatch(name):
                self._check_writer(name, them)
                return self._records.replace(kind, name, value)
            case {"do": "all", "kind": kind} if kind in _REPLACED:
                return self._records.all(kind)
            case {"do": "create", "kind": kind, "number": int(number), "value": value} if kind in _NUMBERED and 0 < number < _NUMBERS:
                created = self._records.create(kind, number, value)
                return {"created": created, "there": None if created else self._records.at(kind, number)}
            case {"do": "newest", "kind": kind} if kind in _NUMBERED:
                return self._records.newest(kind)
            case {"do": "post", "place": str(place), "key": str(key), "text": str(text)} if _PLACE.fullmatch(place):
                return self._post(place, key, text)
            case {"do": "read", "place": str(place), "keys": list(keys)}:
                with self._lock:
                    posted = self._places.get(place, {})
                    return {key: posted[key] for key in map(str, keys) if key in posted}
        raise ValueError("not a request of ours")

    def _check_writer(self, name: str, them: Introduction) -> None:
        """Keeps two runs from being the same island."""
        with self._lock:
            known = self._writers.get(name)
            if known is None or known["id"] != them.id:
                # Somebody may have given the name free.
                known = self._records.all("writers").get(name)
            if known is None:
                known = {"id": them.id, "where": them.where}
                self._records.replace("writers", name, known)
            self._writers[name] = known
        if known["id"] != them.id:
            raise _TakenError(known["where"])

    def _post(self, place: str, key: str, text: str) -> None:
        with self._lock:
            self._places.setdefault(place, {})[key] = text
            while len(self._places) > _MOST_PLACES:
                del self._places[next(iter(self._places))]


class _TakenError(Exception):
    """A name that another run writes under."""
