"""Where islands stop that are all told to: at one step, so that they can begin again together without repeating any.

Each learns of it by itself, some steps apart. An island says at which step it is and waits for the others to say so; the furthest step is
everybody's. Nobody is made to wait for one that was not told, or not in time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from factory_train.diloco_schedule import Schedule
from factory_train.distributed.board import Board

# An island that was told waits so long for the others to be: where its machines may be taken away soon, and where a person asked.
WAIT_S = 3.0
ASKED_WAIT_S = 15.0
# One that is behind goes on for so long at most: the machines may be taken away soon.
CATCH_UP_S = 5.0
# Next to a round islands wait for each other's parts, so they meet behind one that is no further away than this.
_NEAR_S = 1.0


class StopMeeting:
    """An island's part in it; rank 0 of each has one.

    Args:
        board: what the islands share.
        island, incarnation: this one.
        schedule: of the run.
    """

    def __init__(self, board: Board, island: str, incarnation: int, schedule: Schedule) -> None:
        self._board, self._island, self._incarnation, self._schedule = board, island, incarnation, schedule
        self._meets_at: int | None = None

    def stops_at(self, step: int, members: Mapping[str, int], step_s: float, wait_s: float = WAIT_S) -> int | None:
        """Returns the step after which this island stops, not before `step`; None while it should go on and ask after the next.

        Args:
            step: completed ones of this island.
            members: incarnation of each island that takes part, this one too.
            step_s: what a step takes.
            wait_s: how long the others are waited for.
        """
        try:
            return self._stops_at(step, members, step_s, wait_s)
        except OSError:
            # The board is away: nobody can be met there.
            return step

    def _stops_at(self, step: int, members: Mapping[str, int], step_s: float, wait_s: float) -> int | None:
        others = {name: incarnation for name, incarnation in members.items() if name != self._island}
        if self._meets_at is None:
            self._meets_at = self._behind_a_round(step, step_s)
        if step < self._meets_at and not self._board.stops(others):
            return None
        self._board.write_stop(self._island, self._incarnation, step)
        limit = time.monotonic() + wait_s
        while len(said := self._board.stops(others)) < len(others) and time.monotonic() < limit:
            time.sleep(0.02)
        furthest = max([step, *said.values()])
        return furthest if (furthest - step) * step_s <= CATCH_UP_S else step

    def _behind_a_round(self, step: int, step_s: float) -> int:
        """Returns the first step from `step` on before which a round was applied, or `step` where none is near."""
        last = min(self._schedule.steps, step + int(_NEAR_S / max(step_s, 1e-6)))
        for later in range(step, last + 1):
            moment = self._schedule.at(later - 1) if later > 1 else None
            if moment is not None and (moment.apply or moment.drain):
                return later
        return step
