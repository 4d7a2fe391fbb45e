"""Islands as threads of one process that talk over real gloo groups."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from unrecorded import stop_recording

from factory_train.distributed.gloo_wire import GlooWire

_NUMBER = iter(range(10**6))

stop_recording()


def run_islands(members: int, work: Callable[[GlooWire], Any], timeout_s: float = 60.0, wire: type[GlooWire] = GlooWire) -> list[Any]:
    """Runs `work` once a member, each in a thread with its own wire, and returns what they return, or raise, in order."""
    store, name = dist.HashStore(), f"group{next(_NUMBER)}"
    results: list[Any] = [None] * members

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            mine = wire(dist.PrefixStore(name, store), rank, members, datetime.timedelta(seconds=timeout_s))
            results[rank] = work(mine)
        except Exception as error:
            results[rank] = error

    join([threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(members)], 6 * timeout_s)
    return results


def join(threads: Sequence[threading.Thread], timeout_s: float = 60.0) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
        assert not thread.is_alive(), "an island hangs"
