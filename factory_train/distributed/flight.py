"""A round under way: a thread of its own talks to the other islands while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from factory_train.distributed.encoded_reduce import Notice, Reduced, reduce_round
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.outer_state import Encoded


class Flight:
    """One round of one rank, from the moment its pseudo-gradient is encoded.

    Args:
        wire: to the other islands.
        notice: makes what this island says, once `encoded` is in host memory; it may take its time.
        encoded: its pseudo-gradient.
        format: of the codes.
        device: where the reduction is computed.
    """

    def __init__(self, wire: GlooWire, notice: Callable[[], Notice], encoded: Encoded, format: str, device: torch.device) -> None:
        self._wire, self._notice, self._encoded, self._format, self._device = wire, notice, encoded, format, device
        self._reduced: Reduced | None = None
        self._failure: Exception | None = None
        # Seconds from departure to arrival, and that training waited.
        self.took_s = self.waited_s = 0.0
        self._thread = threading.Thread(target=self._run, name="diloco-exchange", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._encoded.wait()
            with torch.no_grad():
                self._reduced = reduce_round(
                    self._wire, self._notice(), self._encoded.codes, self._encoded.scales, self._format, self._device
                )
        except Exception as error:
            self._failure = error
        self.took_s = time.monotonic() - began

    @property
    def has_arrived(self) -> bool:
        """Whether `arrive` returns at once."""
        return not self._thread.is_alive()

    def arrive(self) -> Reduced | Exception:
        """Returns the result, or what went wrong, waiting for it."""
        began = time.monotonic()
        self._thread.join()
        self.waited_s = time.monotonic() - began
        result = self._failure or self._reduced
        assert result is not None
        return result


@dataclass(frozen=True)
class Arrival:
    """What a round came to, the same on all ranks of an island up to their shards.

    Args:
        codes, scales: encoded mean; None where nobody weighed anything.
        counted: whether this rank's part is in it.
        turn_over: whether islands join now.
        notices: of all islands; empty on copies and where a peer told the result.
        took_s, waited_s: seconds the exchange took, and that training waited for it.
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
