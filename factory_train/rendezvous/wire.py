"""Messages between islands and the server of their records: JSON with its length before it, after a handshake.

Each side shows that it knows the token without sending it: a keyed hash over what both have just made up. What follows is
neither encrypted nor signed; like the rounds of islands themselves it belongs on a network that is trusted, or into a tunnel.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

SPEAKS = "factory_train rendezvous"
VERSION = 1
# The largest message: a value of an epoch or all signs of life. Before the handshake is over, a stranger may send little.
MAX_BYTES = 1 << 20
HELLO_BYTES = 4096
_LENGTH = struct.Struct(">I")
_CHUNK = 1 << 16


class ForeignError(Exception):
    """What arrived is no message of ours: too long, or not JSON."""


class Channel:
    """One end of a connection.

    Args:
        connection: a connected socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, value: Any, timeout_s: float) -> None:
        """Sends a message.

        Raises:
            OSError: the other end is gone, or takes nothing.
            ValueError: it is too long.
        """
        data = json.dumps(value, separators=(",", ":")).encode()
        if len(data) > MAX_BYTES:
            raise ValueError(f"a message of {len(data)} bytes; {MAX_BYTES} is the most")
        self._socket.settimeout(timeout_s)
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self, timeout_s: float | None, most: int = MAX_BYTES) -> dict[str, Any]:
        """Returns the next message.

        Args:
            timeout_s: for all of it; None waits for its beginning as long as it takes.

        Raises:
            OSError: the other end is gone, or too slow.
            ForeignError: it is not one of ours.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > most:
            raise ForeignError(f"a message of {length} bytes; {most} is the most")
        try:
            value = json.loads(self._read(length, deadline))
        except (ValueError, RecursionError):
            raise ForeignError("a message that is not JSON") from None
        if not isinstance(value, dict):
            raise ForeignError("a message without fields")
        return value

    def close(self) -> None:
        self._socket.close()

    def _read(self, count: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            # A whole message in time, not each of its bytes.
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("the other end is too slow")
            self._socket.settimeout(left)
            part = self._socket.recv(min(_CHUNK, count - len(data)))
            if not part:
                raise ConnectionResetError("the other end has closed the connection")
            data += part
        return bytes(data)


@dataclass(frozen=True)
class Introduction:
    """Who an end of a connection is.

    Args:
        id: of its run's exchange folder (`address.identity`).
        where: host and folder, for people.
    """

    id: str
    where: str


class WrongTokenError(Exception):
    """The two ends do not know the same token."""


class OtherVersionError(Exception):
    """The two ends speak different versions.

    Args:
        theirs: of the other end.
    """

    def __init__(self, theirs: Any) -> None:
        super().__init__(theirs)
        self.theirs = theirs


def welcome(channel: Channel, token: bytes, me: Introduction, timeout_s: float) -> Introduction:
    """The server's part of the handshake; returns who has come.

    Raises:
        OSError, ForeignError, WrongTokenError, OtherVersionError: they may not stay.
    """
    nonce = secrets.token_hex(16)
    channel.send({"speaks": SPEAKS, "version": VERSION, "nonce": nonce}, timeout_s)
    answer = channel.receive(timeout_s, HELLO_BYTES)
    if answer.get("version") != VERSION:
        raise OtherVersionError(answer.get("version"))
    them = Introduction(str(answer.get("id")), str(answer.get("where")))
    theirs = str(answer.get("nonce"))
    if not hmac.compare_digest(str(answer.get("proof")).encode(), _proof(token, "client", nonce, theirs, them).encode()):
        channel.send({"refused": "token"}, timeout_s)
        raise WrongTokenError
    channel.send({"id": me.id, "where": me.where, "proof": _proof(token, "server", nonce, theirs, me)}, timeout_s)
    return them


def introduce(channel: Channel, token: bytes, me: Introduction, timeout_s: float) -> Introduction:
    """The client's part of the handshake; returns who serves.

    Raises:
        OSError, ForeignError, WrongTokenError, OtherVersionError: it cannot be spoken to.
    """
    hello = channel.receive(timeout_s, HELLO_BYTES)
    if hello.get("speaks") != SPEAKS:
        raise ForeignError("a greeting of another program")
    if hello.get("version") != VERSION:
        raise OtherVersionError(hello.get("version"))
    nonce = secrets.token_hex(16)
    proof = _proof(token, "client", str(hello.get("nonce")), nonce, me)
    channel.send({"version": VERSION, "nonce": nonce, "id": me.id, "where": me.where, "proof": proof}, timeout_s)
    answer = channel.receive(timeout_s, HELLO_BYTES)
    them = Introduction(str(answer.get("id")), str(answer.get("where")))
    expected = _proof(token, "server", str(hello.get("nonce")), nonce, them)
    if "refused" in answer or not hmac.compare_digest(str(answer.get("proof")).encode(), expected.encode()):
        raise WrongTokenError
    return them


def _proof(token: bytes, role: str, server: str, client: str, who: Introduction) -> str:
    """The role is part of it, so that nobody can be shown his own."""
    text = json.dumps([SPEAKS, VERSION, role, server, client, who.id, who.where])
    return hmac.new(token, text.encode(), hashlib.sha256).hexdigest()
