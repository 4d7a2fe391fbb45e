"""Where islands stop that are all told to: at one step, so that they can begin again together without repeating any.

Each learns of it by itself, some steps apart, and says at which step. Where the next round is near, all go on and stop behind the first
that was sent when everybody had been told: whoever has applied it sees what all had said before they sent their parts, so all find the same
step, and none stands still while another waits for its part. Where rounds are far apart an island waits where it is for the others to say
where they are, and the furthest step is everybody's. Nobody is made to wait for long for one that was not told.
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
# A round further away than this is not waited for.
_NEAR_S = 2.0


class StopMeeting:
    """An island's part in it; rank 0 of each has one.

    Args:
        board: what the islands share.
        island, incarnation: this one.
        schedule: of the run.
    """

    def __init__(self, board: Board, island: str, incarnation: int, schedule: Schedule) -> None:
        self._board, self._island, self._incarnation, self._schedule = board, island, incarnation, schedule
        # The step at which this island was told, and when; whether a round was near.
        self._told: tuple[int, float] | None = None
        self._near = False

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
        if not others:
            return step
        if self._told is None:
            later = self._behind_a_round(step)
            self._told, self._near = (step, time.monotonic()), later is not None and (later - step) * step_s <= _NEAR_S
            self._board.write_stop(self._island, self._incarnation, step)
        told_at, since = self._told
        said = self._board.stops(others)
        if not self._near:
            while len(said) < len(others) and time.monotonic() < since + wait_s:
                time.sleep(0.02)
                said = self._board.stops(others)
            furthest = max([step, *said.values()])
            return furthest if (furthest - step) * step_s <= CATCH_UP_S else step
        if len(said) == len(others):
            meets_at = self._behind_a_round(max(told_at, *said.values()))
            return meets_at if meets_at is not None and meets_at >= step and (meets_at - step) * step_s <= CATCH_UP_S else step
        return step if time.monotonic() >= since + wait_s else None

    def _behind_a_round(self, told_at: int) -> int | None:
        """Returns the first step before which a round was applied that was sent after step `told_at` or later; None where none follows."""
        for applied in range(max(1, told_at), self._schedule.steps):
            moment = self._schedule.at(applied)
            if any(item.sent >= told_at for item in (*moment.apply, *moment.drain)):
                return applied + 1
        return None
