"""Where islands stop that are all told to: at one step, so that they can begin again together without repeating any.

Each learns of it by itself, some steps apart, and says at which step, and whether its next round is near. If it is to any of them, all stop
behind the first round that was sent when everybody had been told: whoever has applied it sees what all had said before they sent their
parts, so all find the same step. If rounds are far apart, the furthest step is everybody's.

Until all have been told, one whose round is near goes on. One whose round is far stands still, unless another was seen to be further: that
one may wait for its part of a round and would never hear that it is to stop. It was not told up to there, so going on as far is no further
than where all will stop. Nobody is made to wait for long for one that was not told.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from factory_train.diloco_schedule import Schedule
from factory_train.distributed.board import Board, Told

# An island that was told waits so long for the others to be: where its machines may be taken away soon, and where a person asked.
WAIT_S = 3.0
ASKED_WAIT_S = 15.0
# One that is behind goes on for so long at most: the machines may be taken away soon.
CATCH_UP_S = 5.0
# A round further away than this is not waited for.
_NEAR_S = 2.0
_LOOK_EVERY_S = 0.02


class StopMeeting:
    """An island's part in it; rank 0 of each has one.

    Args:
        board: what the islands share.
        island, incarnation: this one.
        schedule: of the run.
    """

    def __init__(self, board: Board, island: str, incarnation: int, schedule: Schedule) -> None:
        self._board, self._island, self._incarnation, self._schedule = board, island, incarnation, schedule
        # What this island said when it was told, and when that was.
        self._told: Told | None = None
        self._since = 0.0

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
            self._told, self._since = Told(step, later is not None and (later - step) * step_s <= _NEAR_S), time.monotonic()
            self._board.write_stop(self._island, self._incarnation, self._told)
        while len(said := self._board.stops(others)) < len(others) and time.monotonic() < self._since + wait_s:
            if self._told.near or self._is_passed(step, others):
                return None
            time.sleep(_LOOK_EVERY_S)
        told = (self._told, *said.values())
        furthest = max(each.step for each in told)
        meets_at: int | None = furthest
        if any(each.near for each in told):
            meets_at = self._behind_a_round(furthest) if len(said) == len(others) else None
        return meets_at if meets_at is not None and meets_at >= step and (meets_at - step) * step_s <= CATCH_UP_S else step

    def _is_passed(self, step: int, others: Mapping[str, int]) -> bool:
        """Whether an island has begun what follows this step, where a round may be sent that it will wait for."""
        beats = self._board.beats()
        return any(name in beats and beats[name].incarnation == others[name] and beats[name].step >= step for name in others)

    def _behind_a_round(self, told_at: int) -> int | None:
        """Returns the first step before which a round was applied that was sent after step `told_at` or later; None where none follows."""
        for applied in range(max(1, told_at), self._schedule.steps):
            moment = self._schedule.at(applied)
            if any(item.sent >= told_at for item in (*moment.apply, *moment.drain)):
                return applied + 1
        return None
