"""A round under way: another thread talks to the other islands while training goes on."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from concurrent.futures import Executor, wait
from dataclasses import dataclass

import torch

from factory_train.distributed.encoded_reduce import Notice, Reduced, reduce_round
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.outer_state import Encoded


class Flight:
    """One round of one rank, from the moment its pseudo-gradient is encoded.

    Args:
        wire: to the other islands.
        notice: makes what this island says, once `encoded` is in host memory.
        fingerprint: takes that of its state; it may take its time.
        encoded: its pseudo-gradient.
        format: of the codes.
        device: where the reduction is computed.
        thread: one thread for all rounds: what its allocator keeps is then used again.
    """

    def __init__(
        self,
        wire: GlooWire,
        notice: Callable[[], Notice],
        fingerprint: Callable[[], int],
        encoded: Encoded,
        format: str,
        device: torch.device,
        thread: Executor,
    ) -> None:
        self._reduced: Reduced | None = None
        self._failure: Exception | None = None
        # Seconds from departure to arrival.
        self.took_s = 0.0
        # What the round reads was queued before this; what training queues afterwards it does not wait for.
        ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

        def fly() -> Reduced:
            encoded.wait()
            with torch.no_grad(), _beside_training(device, ready):
                return reduce_round(wire, notice(), encoded.codes, encoded.scales, format, device, fingerprint)

        # The arguments are not kept: whoever made `notice` holds this flight, and garbage of that size must not wait for a collection.
        self._future = thread.submit(self._run, fly, wire)

    def _run(self, fly: Callable[[], Reduced], wire: GlooWire) -> None:
        began = time.monotonic()
        try:
            self._reduced = fly()
        except Exception as error:
            # Members that wait for this one, and not for the one that is gone, need not wait any longer.
            wire.close()
            # Its traceback would keep the tensors of all frames.
            self._failure = error.with_traceback(None)
        self.took_s = time.monotonic() - began

    def is_over(self, within_s: float) -> bool:
        """Returns whether it has arrived, or failed, waiting for it as long as that."""
        return not wait([self._future], within_s).not_done

    def arrive(self) -> Reduced | Exception:
        """Returns the result, or what went wrong, waiting for it."""
        self._future.result()
        result = self._failure or self._reduced
        assert result is not None
        return result


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside_training(device: torch.device, ready: torch.cuda.Event | None) -> contextlib.AbstractContextManager[object]:
    """Keeps what a round computes on a card from queuing behind training; what comes of it is in host memory."""
    if ready is None:
        return contextlib.nullcontext()
    stream = _stream(device)
    stream.wait_event(ready)
    return torch.cuda.stream(stream)


class Waiting:
    """While training waits for other islands: whatever fails meanwhile counts against one grace time. Enter it with `with`."""

    def __init__(self) -> None:
        self._since = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = 0.0

    def seconds(self) -> float:
        """Returns how long it has been; 0 while training does not wait."""
        return time.monotonic() - self._since if self._since else 0.0


@dataclass(frozen=True)
class Arrival:
    """What a round came to, the same on all ranks of an island up to their shards.

    Args:
        codes, scales: encoded mean; None where nobody weighed anything.
        counted: whether this rank's part is in it.
        turn_over: whether islands join now.
        notices: of all islands; empty on copies and where a peer told the result.
        took_s, waited_s: seconds the exchange took, and that training waited for it, whatever failed meanwhile.
        num_bytes: what this rank sent.
    """

    codes: torch.Tensor | None
    scales: torch.Tensor | None
    counted: bool
    turn_over: bool
    notices: tuple[Notice, ...]
    took_s: float
    waited_s: float
    num_bytes: int


@dataclass
class UnderWay:
    """The round this rank has sent, kept until it is over: in another epoch it is sent again as it is."""

    number: int
    fragment: int
    encoded: Encoded | None
    weight: float
    flags: int
    flight: Flight | None = None
    caught: Reduced | None = None
