"""Four processes that stay alive over a test module and form gloo worlds of 1, 2 or 4 ranks as tests ask.

Importing torch takes longer than any of these tests, so one process does it, and the ranks are forked from that.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

TIMEOUT_S = 60.0


class RankPool:
    """Processes that wait for tasks.

    Args:
        preload: the module that holds the tasks.
    """

    def __init__(self, preload: str, size: int = 4) -> None:
        from torch.distributed import TCPStore

        # One store for all worlds: a new one, or files, would take longer than most of the tests.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._worlds = 0
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([preload])
        pairs = [context.Pipe() for _ in range(size)]
        self._connections = [mine for mine, _ in pairs]
        self._processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
        # The server that forks gets its environment when the first process starts.
        settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with mock.patch.dict(os.environ, settings):
            for process in self._processes:
                process.start()

    def run(self, world_size: int, task: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Calls `task(rank, world_size, *args)` in a new world; returns the results in order of rank.

        Raises:
            AssertionError: a rank raised, or did not answer within `timeout_s`.
        """
        self._worlds += 1
        members = self._connections[:world_size]
        for rank, connection in enumerate(members):
            connection.send((self._store.port, f"world-{self._worlds}", rank, world_size, task, args))
        answers = []
        for rank, connection in enumerate(members):
            assert connection.poll(timeout_s), f"rank {rank} hangs"
            answers.append(connection.recv())
        for rank, (error, _) in enumerate(answers):
            assert error is None, f"rank {rank}: {error}"
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # All of torch, which collecting garbage after each task would look through.
    gc.freeze()
    stores: dict[int, dist.Store] = {}
    while True:
        try:
            port, world, rank, world_size, task, args = connection.recv()
        except EOFError:
            return
        try:
            stores[port] = stores.get(port) or dist.TCPStore("127.0.0.1", port, is_master=False)
            store = dist.PrefixStore(world, stores[port])
            timeout = datetime.timedelta(seconds=TIMEOUT_S / 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
            answer = None, task(rank, world_size, *args)
        except BaseException:
            answer = traceback.format_exc(), None
        if dist.is_initialized():
            dist.destroy_process_group()
        # Modules in reference cycles would keep a mesh, and with it the sockets its peers wait on.
        gc.collect()
        connection.send(answer)
