"""The address where islands meet, the token they know each other by, and who a run directory is."""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from factory_train import storage
from factory_train.errors import ConfigError, PolicyError

KEY = "diloco.rendezvous"
TOKEN_VARIABLE = "FACTORY_TRAIN_RENDEZVOUS_TOKEN"
_EXAMPLE = f"{KEY}=tcp://HOST:PORT, or {KEY}=null for the run directory"
_SHORTEST_TOKEN = 16


@dataclass(frozen=True)
class Address:
    """Host and port that one launcher listens at and all islands connect to."""

    host: str
    port: int

    @staticmethod
    def parse(text: str) -> Address:
        """Reads tcp://HOST:PORT.

        Raises:
            ConfigError: it is something else, or an address that nobody can connect to.
        """
        try:
            parts = urlsplit(text)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"'{text}' is no address ({error})", where=KEY, fix=_EXAMPLE) from None
        if parts.scheme != "tcp" or not host or not port or parts.path or parts.query or parts.username:
            raise ConfigError(f"'{text}' is no address of the form tcp://HOST:PORT", where=KEY, fix=_EXAMPLE)
        if _is(host, "is_unspecified"):
            raise ConfigError(f"{host} means any address, and islands need one to connect to", where=KEY, fix=_EXAMPLE)
        return Address(host, port)

    def __str__(self) -> str:
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it says by itself that it is for this machine alone."""
        return self.host == "localhost" or _is(self.host, "is_loopback")


def _is(host: str, what: str) -> bool:
    try:
        return bool(getattr(ipaddress.ip_address(host), what))
    except ValueError:
        return False


def token_path(folder: Path) -> Path:
    """Returns the file with the token, below the exchange folder of a run."""
    return folder / "token"


def keep_token(folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Makes sure that a run has a token that only its owner can read: that of the environment, else the one it has, else a new one.

    Raises:
        ConfigError: that of the environment is too short to keep anybody out.
    """
    path, given = token_path(folder), environ.get(TOKEN_VARIABLE)
    if given is not None and len(given) < _SHORTEST_TOKEN:
        raise ConfigError(
            f"a token of {len(given)} characters is too short",
            where=f"${TOKEN_VARIABLE}",
            fix=f"export {TOKEN_VARIABLE}=$(openssl rand -hex 32)",
        )
    if given is None and path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".token.{secrets.token_hex(4)}.tmp")
    # Never readable for others, not even before its mode is changed.
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(given or secrets.token_hex(32))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_token(folder: Path) -> bytes:
    """Returns the token of a run.

    Raises:
        ConfigError: it has none.
        PolicyError: others can read it.
    """
    path = token_path(folder)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise PolicyError("others can read the token of the rendezvous", where=str(path), fix=f"chmod 600 {path}")
            return file.read().strip()
    except FileNotFoundError:
        raise ConfigError("the run has no token for the rendezvous", where=str(path), fix="start it again with run=NAME") from None


def identity(folder: Path) -> str:
    """Returns what tells the exchange folder of one run from that of any other; made when it is first asked for."""
    path = folder / "id.json"
    found = storage.read_json(path)
    if found is None:
        storage.write_json_once(path, {"id": secrets.token_hex(8)})
        found = storage.read_json(path)
    return str(found["id"])
