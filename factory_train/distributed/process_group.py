"""Joining the gang's process group, and the device each rank uses."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train import storage
from factory_train.errors import FactoryTrainError, PreflightError
from factory_train.launchers.job import WorkerEnv

CONNECT_TIMEOUT_S = 60.0
# Below the ports that Linux gives to whoever asks for any (32768 and up, unless a site moved them), above the well-known ones.
_PORTS = (20000, 32000)
_PORT_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORT_TRIES = 50


def choose_device(kind: str, local_rank: int) -> torch.device:
    """Returns the device of this rank: its CUDA card, or the CPU; `kind` is hardware.device."""
    use_cuda = torch.cuda.is_available() if kind == "auto" else kind == "cuda"
    if not use_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(
    env: WorkerEnv, rendezvous: Path, device: torch.device, timeout_s: float = 1800.0, *, allow_loopback: bool = False
) -> Iterator[None]:
    """Holds the default process group of the gang: gloo for CPU tensors, NCCL too on CUDA.

    With `env.master_port == 0` rank 0 takes a free port and publishes it in the file `rendezvous`, so two jobs on
    one machine can never choose the same port.

    Args:
        allow_loopback: whether ranks on different nodes may meet at a loopback address, as on a test cluster.

    Raises:
        FactoryTrainError: the ranks have not all met within `CONNECT_TIMEOUT_S`.
        PreflightError: rank 0 is on another node and its name means this one.
    """
    store = _connect(env, rendezvous, datetime.timedelta(seconds=timeout_s), allow_loopback)
    _await_all(store, env)
    if env.world_size > env.local_world_size and not allow_loopback:
        _choose_interface(store, env)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield
    finally:
        # After a failure the peers may be gone; tearing down is then best effort and must not hide the cause.
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _connect(env: WorkerEnv, rendezvous: Path, timeout: datetime.timedelta, allow_loopback: bool) -> dist.Store:
    if env.rank == 0:
        store = _listen(env, timeout)
        storage.write_json(rendezvous, {"host": env.master_addr, "port": store.port})
        return store
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    address: dict[str, Any] | None = {"host": env.master_addr, "port": env.master_port} if env.master_port else None
    while address is None:
        if time.monotonic() > deadline:
            raise FactoryTrainError(
                f"rank 0 did not publish its address within {CONNECT_TIMEOUT_S:.0f} s",
                where=f"rank {env.rank}",
                fix="see the log of rank 0: it failed before the others could connect",
            )
        # A network filesystem remembers that a file was not there until its folder is read anew.
        os.listdir(rendezvous.parent)
        address = storage.read_json(rendezvous)
        if address is None:
            time.sleep(0.05)
    if env.rank >= env.local_world_size and not allow_loopback:
        _refuse_loopback(address["host"], env.rank)
    try:
        return dist.TCPStore(
            address["host"],
            address["port"],
            env.world_size,
            is_master=False,
            timeout=datetime.timedelta(seconds=max(1.0, deadline - time.monotonic())),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise FactoryTrainError(
            f"cannot reach rank 0 at {address['host']}:{address['port']} within {CONNECT_TIMEOUT_S:.0f} s ({str(error).splitlines()[0]})",
            where=f"rank {env.rank} on {socket.gethostname()}",
            fix="check that the nodes can reach each other there (a firewall between them?), or name the network: launcher.interface=NAME",
        ) from error


def _listen(env: WorkerEnv, timeout: datetime.timedelta) -> dist.TCPStore:
    """Opens the store of the gang on a port that is free here and that no outgoing connection can be given."""
    ports = [env.master_port] if env.master_port else candidate_ports()
    for port in ports:
        try:
            return dist.TCPStore(env.master_addr, port, env.world_size, is_master=True, wait_for_workers=False, timeout=timeout)
        except (dist.DistNetworkError, RuntimeError):
            if port == ports[-1]:
                raise
    raise AssertionError("no candidates")


def candidate_ports() -> list[int]:
    """Returns ports to try in turn, outside the range that the kernel hands out by itself; 0, any, comes last."""
    low, high = _PORTS
    with contextlib.suppress(OSError, ValueError):
        first, last = map(int, _PORT_RANGE_FILE.read_text().split())
        low, high = max(((low, min(high, first)), (max(low, last + 1), 65535)), key=lambda span: span[1] - span[0])
    # Not the seeded generator of the run: jobs that share a node must differ.
    return [*random.SystemRandom().sample(range(low, high), min(_PORT_TRIES, max(0, high - low))), 0]


def _refuse_loopback(host: str, rank: int) -> None:
    """Checks that the name of rank 0's node does not mean this very node.

    Raises:
        PreflightError: it does; the ranks would wait for each other until a timeout.
    """
    try:
        addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise PreflightError(
            f"the name of rank 0's node, '{host}', is not known here ({error})",
            where=f"rank {rank} on {socket.gethostname()}",
            fix="name resolution between nodes is the site's to mend; scontrol show node NAME shows what Slurm uses",
        ) from None
    if all(ipaddress.ip_address(address).is_loopback for address in addresses):
        raise PreflightError(
            f"'{host}', where rank 0 is, means {', '.join(sorted(addresses))} here: this node itself",
            where=f"rank {rank} on {socket.gethostname()}",
            fix="mend /etc/hosts of the nodes; launcher.fabric=loopback only where all nodes are one machine",
        )


def _await_all(store: dist.Store, env: WorkerEnv) -> None:
    """Waits until every rank has come, and names those that have not; a collective would only time out.

    Raises:
        FactoryTrainError: some have not come within `CONNECT_TIMEOUT_S`.
    """
    store.set(f"here/{env.rank}", socket.gethostname())
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    missing = list(range(env.world_size))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        if time.monotonic() > deadline:
            ranks = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
            raise FactoryTrainError(
                f"{len(missing)} of {env.world_size} ranks did not connect within {CONNECT_TIMEOUT_S:.0f} s: {ranks}",
                where=f"rank {env.rank} on {socket.gethostname()}",
                fix=f"see their logs: logs RUN --rank {missing[0]}",
            )
        time.sleep(0.05)


def _choose_interface(store: dist.Store, env: WorkerEnv) -> None:
    """Has gloo listen where the other nodes can reach it: by itself it takes what the host's own name resolves to."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    if env.rank == env.local_world_size:
        # How the second node reaches the first is where the first must listen.
        address = _local_address_towards(env.master_addr)
        store.set("reached_from", address or "")
    target = store.get("reached_from").decode() if env.rank < env.local_world_size else env.master_addr
    name = interface_towards(target) if target else None
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _local_address_towards(host: str) -> str | None:
    """Returns the address this machine would use to talk to `host`; nothing is sent."""
    with contextlib.suppress(OSError, IndexError):
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    return None


def interface_towards(host: str) -> str | None:
    """Returns the network interface by which this machine reaches `host`; None where that cannot be known."""
    return interface_of(_local_address_towards(host))


def interface_of(address: str | None) -> str | None:
    """Returns the name of the network interface that has an address; None when none has."""
    import psutil

    return next((name for name, found in psutil.net_if_addrs().items() if any(item.address == address for item in found)), None)
