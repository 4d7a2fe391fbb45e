"""Records that a launcher serves over TCP, as an island sees them."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from typing import Any

from factory_train.errors import ConfigError, FactoryTrainError
from factory_train.rendezvous.address import KEY, TOKEN_VARIABLE, Address
from factory_train.rendezvous.wire import VERSION, Channel, ForeignError, Introduction, OtherVersionError, WrongTokenError, introduce

# How long a connection and an answer are waited for; so long after a failure nobody tries again.
_PATIENCE_S = 5.0
_REST_S = 0.25


class AwayError(ConnectionError):
    """The server does not answer now."""


class TcpRecords:
    """See `records.Records`. A lost connection is made again by the next call; threads may share it.

    Args:
        address: of the server.
        token: that both know.
        me: the run directory this process belongs to.

    Raises:
        AwayError: nobody answers now.
        ConfigError: what answers is something else, knows another token or another version, or has another run for this island.
        FactoryTrainError: the records are others than before.
    """

    def __init__(self, address: Address, token: bytes, me: Introduction) -> None:
        self.address, self._token, self._me = address, token, me
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._not_before, self._last_failure = 0.0, ""
        # Whose records they are, since the first time that somebody answered.
        self._server: Introduction | None = None

    @property
    def is_own(self) -> bool:
        """Whether the records are those of this process's own run directory, as far as it knows."""
        return self._server is not None and self._server.id == self._me.id

    def replace(self, kind: str, name: str, value: Any) -> None:
        """See `records.Records`."""
        self._ask(do="replace", kind=kind, name=name, value=value)

    def all(self, kind: str) -> dict[str, Any]:
        """See `records.Records`."""
        return dict(self._ask(do="all", kind=kind))

    def create(self, kind: str, number: int, value: Any) -> bool:
        """See `records.Records`; True also where an earlier try of this call was written and its answer lost."""
        answer = self._ask(do="create", kind=kind, number=number, value=value)
        return bool(answer["created"] or answer["there"] == _as_read(value))

    def newest(self, kind: str) -> Any:
        """See `records.Records`."""
        return self._ask(do="newest", kind=kind)

    def post(self, place: str, key: str, value: bytes) -> None:
        """Leaves bytes for those who meet at `place`."""
        self._ask(do="post", place=place, key=key, text=base64.b64encode(value).decode())

    def read(self, place: str, keys: list[str]) -> dict[str, bytes]:
        """Returns what is there of `keys` at `place`."""
        return {key: base64.b64decode(text) for key, text in self._ask(do="read", place=place, keys=keys).items()}

    def close(self) -> None:
        """Ends the connection. May be called twice."""
        with self._lock:
            self._hang_up()

    def _ask(self, **asked: Any) -> Any:
        with self._lock:
            answer = self._exchange(asked)
        if "taken" in answer:
            raise ConfigError(
                f"{asked['name']} is an island of another run already: {answer['taken']}",
                where=str(self.address),
                fix="diloco.local_islands=[...] names those that this command starts, different ones on each side; for a run that "
                f"is given up, remove exchange/writers/{asked['name']}.json at {self._server.where if self._server else 'the server'}",
            )
        if "failed" in answer:
            raise AwayError(answer["failed"])
        return answer["value"]

    def _exchange(self, asked: dict[str, Any]) -> dict[str, Any]:
        if self._channel is None and time.monotonic() < self._not_before:
            raise AwayError(self._last_failure)
        # The connection may be one that a server which started again knows nothing of; then a new one is tried at once.
        for is_last in (False, True) if self._channel else (True,):
            try:
                channel = self._channel = self._channel or self._connect()
                channel.send(asked, _PATIENCE_S)
                return channel.receive(_PATIENCE_S)
            except (OSError, ForeignError) as error:
                self._hang_up()
                if is_last:
                    self._not_before = time.monotonic() + _REST_S
                    self._last_failure = str(error)
                    raise AwayError(self._last_failure) from error
        raise AssertionError("no try")

    def _hang_up(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _connect(self) -> Channel:
        where = str(self.address)
        try:
            connection = socket.create_connection((self.address.host, self.address.port), _PATIENCE_S)
        except socket.gaierror as error:
            raise AwayError(f"the name {self.address.host} is not known here ({error.strerror})") from None
        except OSError as error:
            raise AwayError(f"nothing listens at {where} ({error.strerror or error})") from None
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = Channel(connection)
        try:
            server = introduce(channel, self._token, self._me, _PATIENCE_S)
            self._check_server(server)
        except BaseException as error:
            channel.close()
            self._explain(error)
            raise
        self._server = server
        return channel

    def _check_server(self, server: Introduction) -> None:
        if self._server is not None and self._server.id != server.id:
            raise FactoryTrainError(
                f"the membership is served from another run directory now: {server.where}, before: {self._server.where}",
                where=str(self.address),
                fix="islands start again by themselves and join there; start the run that serves with run=NAME to keep its epochs",
            )

    def _explain(self, error: BaseException) -> None:
        """Raises what says more than `error`, where that is known."""
        where = str(self.address)
        match error:
            case WrongTokenError():
                raise ConfigError(
                    "what serves the membership there knows another token",
                    where=where,
                    fix=f"export {TOKEN_VARIABLE}=..., the same where each side is started, or copy exchange/token of the run that serves; "
                    f"for another run, {KEY}= with another port",
                ) from None
            case OtherVersionError():
                raise ConfigError(
                    f"what serves the membership there speaks version {error.theirs} of the protocol, this is {VERSION}",
                    where=where,
                    fix="run the same version of factory_train on all sides",
                ) from None
            case ForeignError():
                raise ConfigError(
                    f"what listens there is another program ({error})", where=where, fix=f"{KEY}=tcp://HOST:PORT with a free port"
                ) from None
            case TimeoutError():
                raise AwayError(f"what listens at {where} says nothing: another program, or a server that hangs") from None
            case OSError():
                raise AwayError(f"{where} has closed the connection ({error})") from None


def _as_read(value: Any) -> Any:
    """Returns the value as JSON gives it back."""
    return json.loads(json.dumps(value))
