"""The launcher's part in a rendezvous over TCP: whoever can bind the address serves it from its run directory."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Iterator

from factory_train.errors import PreflightError
from factory_train.gangs import exchange_folder
from factory_train.rendezvous.address import KEY, Address, identity, read_token
from factory_train.rendezvous.records import FolderRecords
from factory_train.rendezvous.server import RecordsServer
from factory_train.rendezvous.wire import Introduction
from factory_train.run_dir import Attempt

# The address is another machine's, or somebody here serves it already: islands find out whether that is one of ours.
_ELSEWHERE = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)


@contextlib.contextmanager
def serving(attempt: Attempt, note: Callable[..., None]) -> Iterator[None]:
    """Serves the membership of a run meanwhile, if it meets over TCP and the address is this machine's.

    It is a thread of the process that looks after the islands, which none of them can take down with it.

    Args:
        attempt: of the run.
        note: records a launch event.

    Raises:
        PreflightError: the address cannot be what islands meet at.
    """
    cfg = attempt.config()
    if cfg.diloco.rendezvous is None:
        yield
        return
    address, folder = Address.parse(cfg.diloco.rendezvous), exchange_folder(attempt.run)
    if cfg.launcher.fabric != "loopback":
        _refuse_loopback(address)
    me = Introduction(identity(folder), f"{socket.gethostname()}:{attempt.run.path}")
    try:
        server = RecordsServer(address, FolderRecords(folder), read_token(folder), me)
    except OSError as error:
        if error.errno not in _ELSEWHERE:
            raise PreflightError(f"cannot listen there ({error.strerror})", where=str(address), fix=f"{KEY}=tcp://HOST:PORT") from error
        note("rendezvous", address=str(address), message=f"served elsewhere: {error.strerror}")
        yield
        return
    note("rendezvous", address=str(address), message="served here")
    try:
        yield
    finally:
        server.close()


def _refuse_loopback(address: Address) -> None:
    """Checks that a name does not mean this machine to itself alone.

    Raises:
        PreflightError: it does: the other islands would look for the server on their own machines.
    """
    if address.is_loopback:
        return
    with contextlib.suppress(OSError):
        found = {str(info[4][0]) for info in socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM)}
        if all(ipaddress.ip_address(one).is_loopback for one in found):
            raise PreflightError(
                f"the name '{address.host}' means {', '.join(sorted(found))} here: this machine to itself alone",
                where=str(address),
                fix=f"{KEY}=tcp://ADDRESS:{address.port} with an address that the other islands reach",
            )
