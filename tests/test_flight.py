"""A round under way: who fails in it does not leave others waiting."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from island_threads import run_islands

from factory_train.distributed.encoded_reduce import Notice, Reduced
from factory_train.distributed.flight import Flight
from factory_train.distributed.gloo_wire import GlooWire, Parts
from factory_train.distributed.outer_state import Encoded

CPU = torch.device("cpu")
CODES = torch.zeros(6 * 4 * 256, dtype=torch.uint8)


def test_a_member_that_waits_for_one_that_has_failed_fails_with_it() -> None:
    """Member 2 goes when member 0 has its part and member 1 does not: 0 waits for what 1 will never send, and nothing of 2's."""
    waits_for_results = threading.Event()

    class Parting(GlooWire):
        parts = 0

        def all_to_all(self, received: Sequence[Parts], sent: Sequence[Parts], meanwhile: Callable[[], object] = lambda: None) -> None:
            self.parts += 1
            if self.rank == 2:
                for part, member in itertools.product(range(2), range(2)):
                    self.receive(received[member][part], member)
                for part in range(2):
                    self.send(sent[0][part], 0)
                waits_for_results.wait(30)
                self.close()
            elif self.parts == 2:
                threading.Timer(0.5, waits_for_results.set).start()
            super().all_to_all(received, sent, meanwhile)

    # As an island does until it is in the next epoch.
    kept = []

    def work(wire: GlooWire) -> Reduced | Exception:
        kept.append(wire)
        with ThreadPoolExecutor(1) as thread:
            encoded = Encoded(CODES, *torch.empty(3, 0))
            return Flight(wire, lambda: Notice(1, 4, 0, 0, 1.0), lambda: 7, encoded, "fp32", CPU, thread).arrive()

    outcomes = run_islands(3, work, 20.0, Parting)
    assert waits_for_results.is_set(), "member 0 was never at its second part"
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError)
        assert "timed out" not in str(outcome).lower()


@pytest.mark.parametrize("closing", [[0], [0, 2]], ids=["alone", "after another"])
def test_whoever_closes_a_wire_ends_its_own_waiting_too(closing: list[int]) -> None:
    """An island that leaves in the middle of a round must not stay until the round runs out of time."""
    are_closed = {rank: threading.Event() for rank in closing}
    kept = []

    def work(wire: GlooWire) -> Reduced | Exception | None:
        if wire.rank == 1:
            # As a machine without power: nothing comes from it, and its connections stay.
            kept.append(wire)
            return None
        encoded = Encoded(CODES, *torch.empty(3, 0))
        with ThreadPoolExecutor(1) as thread:
            flight = Flight(wire, lambda: Notice(1, 4, 0, 0, 1.0), lambda: 7, encoded, "fp32", CPU, thread)
            for before in closing[: closing.index(wire.rank)]:
                assert are_closed[before].wait(60)
            assert not flight.is_over(0.5), "it does not wait for member 1"
            wire.close()
            are_closed[wire.rank].set()
            assert flight.is_over(30), "it still waits"
            return flight.arrive()

    outcomes = run_islands(1 + len(closing), work, 60.0)
    assert [type(outcomes[rank]) for rank in closing] == [RuntimeError] * len(closing), outcomes
