"""Joining the gang's process group, and the device each rank uses."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from factory_train import storage
from factory_train.errors import FactoryTrainError
from factory_train.launchers.job import WorkerEnv

CONNECT_TIMEOUT_S = 60.0


def choose_device(kind: str, local_rank: int) -> torch.device:
    """Returns the device of this rank: its CUDA card, or the CPU; `kind` is hardware.device."""
    use_cuda = torch.cuda.is_available() if kind == "auto" else kind == "cuda"
    if not use_cuda:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def process_group(env: WorkerEnv, rendezvous: Path, device: torch.device, timeout_s: float = 1800.0) -> Iterator[None]:
    """Holds the default process group of the gang: gloo for CPU tensors, NCCL too on CUDA.

    With `env.master_port == 0` rank 0 takes a free port and publishes it in the file `rendezvous`, so two jobs on
    one machine can never choose the same port.

    Raises:
        FactoryTrainError: rank 0 could not be reached within `CONNECT_TIMEOUT_S`.
    """
    store = _connect(env, rendezvous, datetime.timedelta(seconds=timeout_s))
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


def _connect(env: WorkerEnv, rendezvous: Path, timeout: datetime.timedelta) -> dist.Store:
    if env.rank == 0:
        store = dist.TCPStore(env.master_addr, env.master_port, env.world_size, is_master=True, wait_for_workers=False, timeout=timeout)
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
        address = storage.read_json(rendezvous)
        if address is None:
            time.sleep(0.05)
    try:
        return dist.TCPStore(
            address["host"],
            address["port"],
            env.world_size,
            is_master=False,
            timeout=datetime.timedelta(seconds=CONNECT_TIMEOUT_S),
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise FactoryTrainError(
            f"cannot reach rank 0 at {address['host']}:{address['port']} ({error})",
            where=f"rank {env.rank}",
            fix="check that the nodes can reach each other on that address",
        ) from error
