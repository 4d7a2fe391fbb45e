"""A point of a sweep between the command line and its run."""

from __future__ import annotations

from dataclasses import dataclass

from factory_train.commands.submission import Request
from factory_train.compose import Composition
from factory_train.sweep import SweepPoint


@dataclass(frozen=True)
class Draft:
    """A point that was checked and planned.

    Args:
        point: its entry in the record of the sweep.
        request: what starts its run.
        composition: where its configuration comes from.
    """

    point: SweepPoint
    request: Request
    composition: Composition
