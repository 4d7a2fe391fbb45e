"""Copying a rank's share of the state to host memory while training goes on.

Weights and moments do not change during forward and backward passes, so the copy has until the next optimizer step:
a thread makes it on a CPU, a side stream on CUDA, and only that step waits for what is left of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from factory_train.checkpoint.arena import Arena
from factory_train.checkpoint.entries import Writes
from factory_train.distributed.encoded import Stored


class Snapshot:
    """One copy at a time of tensors into an arena.

    Args:
        arena: where to; large enough for the part.
        device: of the tensors.
    """

    def __init__(self, arena: Arena, device: torch.device) -> None:
        self._host = torch.frombuffer(arena.memory, dtype=torch.uint8)
        # Page faults are taken here, not while a step waits.
        self._host.zero_()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            _page_lock(self._host)
        self._copied = threading.Event()
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._on_device: torch.cuda.Event | None = None

    def begin(self, writes: Writes, then: Callable[[Exception | None], None]) -> None:
        """Starts copying; `then` is called in a thread of its own when all bytes are in the arena, or with what went wrong.

        The tensors must not change before `before_update` has returned.
        """
        self._copied.clear()
        if self._stream is not None:
            self._copy_on_device(writes, self._stream)
        self._thread = threading.Thread(target=self._run, args=(writes, then), name="checkpoint-snapshot", daemon=True)
        self._thread.start()

    def before_update(self) -> None:
        """Returns when the tensors may change: at once on CUDA, where the stream of the caller waits instead."""
        if self._on_device is not None:
            torch.cuda.current_stream().wait_event(self._on_device)
            self._on_device = None
        elif self._stream is None:
            self._copied.wait()

    def wait(self) -> None:
        """Returns when `then` of the last copy has returned."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Lets go of the arena."""
        self.wait()
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._host.data_ptr())
        del self._host

    def _copy_on_device(self, writes: Writes, stream: torch.cuda.Stream) -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for start, tensor in writes.sources:
                self._place(start, tensor).copy_(tensor.detach(), non_blocking=True)
        self._on_device = torch.cuda.Event()
        self._on_device.record(stream)

    def _run(self, writes: Writes, then: Callable[[Exception | None], None]) -> None:
        failure: Exception | None = None
        try:
            if self._stream is not None:
                self._stream.synchronize()
            else:
                for start, tensor in writes.sources:
                    self._place(start, tensor).copy_(tensor.detach())
        except Exception as error:
            failure = error
        self._copied.set()
        then(failure)

    def _place(self, start: int, tensor: Stored) -> torch.Tensor:
        """Returns the tensor's place in the arena, as a tensor of its type and shape; wider types come first, so it is aligned."""
        return self._host[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def _page_lock(host: torch.Tensor) -> None:
    """Page-locks memory for asynchronous copies; where the driver refuses, copies are merely slower."""
    torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
