"""Fingerprints of an island's outer state: equal on all islands after every round, or something is wrong."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from factory_train.distributed.outer_state import OuterState
from factory_train.errors import IntegrityError


class Fingerprints:
    """Those of one rank, a fragment each, taken again only where something has changed.

    Args:
        state: whose they are.
    """

    def __init__(self, state: OuterState) -> None:
        self._state = state
        # A number, or the parts of one where they are still on the device, or None: to be taken when it is asked for.
        self._prints: list[int | torch.Tensor | None] = [0] * len(state)

    def take_all(self) -> None:
        """Takes them from the state as it is."""
        for fragment in range(len(self._prints)):
            self._prints[fragment] = self._state.fingerprint(fragment)

    def take_anew(self, fragment: int) -> int:
        """Takes one from the bits as they are now, whatever was noted: memory can go wrong too. Returns that of all fragments."""
        self._prints[fragment] = self._state.fingerprint(fragment)
        return self.total()

    def note(self, fragment: int, parts: torch.Tensor) -> None:
        """Notes a new one: the parts of it, read when it is asked for, or no parts where it is to be taken then."""
        self._prints[fragment] = parts if parts.numel() else None

    def of(self, fragment: int) -> int:
        """Returns that of a fragment."""
        if (found := self._prints[fragment]) is None:
            return self._state.fingerprint(fragment)
        return int(found.sum().item()) if isinstance(found, torch.Tensor) else found

    def total(self) -> int:
        """Returns that of all fragments, as a signed 64-bit number."""
        total = sum(map(self.of, range(len(self._prints)))) & (2**64 - 1)
        return total - 2**64 if total >= 2**63 else total


def check_same(prints: Sequence[int], islands: Sequence[str], after: str, where: str) -> None:
    """Checks that all islands have the same outer state.

    Args:
        prints: of each island.
        islands: their names.
        after: what came before, for the message.
        where: fragment and step.

    Raises:
        IntegrityError: they differ; it names who agrees with whom.
    """
    camps: dict[int, list[str]] = {}
    for name, value in zip(islands, prints, strict=True):
        camps.setdefault(value, []).append(name)
    if len(camps) > 1:
        text = " against ".join(", ".join(names) for names in sorted(camps.values(), key=len, reverse=True))
        raise IntegrityError(
            f"the outer parameters of the islands differ after {after}: {text}",
            where=where,
            fix="resume from the last checkpoint; if it happens again, look for a machine with bad memory among the fewer",
        )
