"""Where the islands of a Ray job go: a placement group each, all of them at once or none."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from factory_train.launchers.ray_gang import Gang, Placement, Waiting, distinct, make_group, rooms, staff
from factory_train.launchers.ray_room import Wanted
from factory_train.run_dir import Attempt

_TURN_S = 0.5
# So long some islands hold their places while others have none; then all are given back: another job may be one island short too.
_HOLD_S = 10.0
_PAUSE_S = (1.0, 5.0)
# A group that had its place and does not say so within this time has lost it; a busy cluster needs seconds to answer.
_LOST_S = 15.0


class Places:
    """The placement groups of a job's islands, each for one attempt of its island.

    Args:
        attempt: of the run.
        spec: content of its launch/ray.json.
    """

    def __init__(self, attempt: Attempt, spec: dict[str, Any]) -> None:
        self._attempt, self._spec = attempt, spec
        self._all = Wanted(**spec["wanted"])
        self._one = replace(self._all, gangs=1)
        self._waiting = Waiting(attempt, self._all)
        self._serial = itertools.count()
        self._groups: dict[str, tuple[str, PlacementGroup]] = {}

    def reserve(self, stopped: Callable[[], bool], beat: Callable[[], None]) -> bool:
        """Waits until all islands have a place, or after launcher.elastic.wait_s the fewest that may begin; False when stopped first."""
        began, reserved = time.monotonic(), False
        try:
            while not stopped():
                for island in self._spec["islands"]:
                    self._make(island["name"])
                if self._wait(began, stopped, beat):
                    reserved = True
                    break
                self.close()
                self._rest(random.uniform(*_PAUSE_S), stopped, beat)
        finally:
            if not reserved:
                self.close()
        if reserved:
            self._waiting.is_over(self._nodes())
        return reserved

    def _wait(self, began: float, stopped: Callable[[], bool], beat: Callable[[], None]) -> bool:
        """Waits for the groups that were made; returns whether enough of them have their place, and gives the others back then."""
        held_since: float | None = None
        while not stopped():
            beat()
            ready = [name for name, (_, group) in self._groups.items() if placement_group_table(group).get("state") == "CREATED"]
            now = time.monotonic()
            if len(ready) == len(self._groups) or (now - began > self._spec["elastic_wait_s"] and len(ready) >= self._spec["fewest"]):
                for name in set(self._groups) - set(ready):
                    self.give_back(name)
                return True
            if now - began > 2 * _TURN_S:
                self._waiting.goes_on(rooms())
            held_since = held_since or now if ready else None
            if held_since is not None and now - held_since > _HOLD_S:
                return False
            time.sleep(_TURN_S)
        return False

    def _rest(self, seconds: float, stopped: Callable[[], bool], beat: Callable[[], None]) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not stopped():
            beat()
            time.sleep(_TURN_S)

    def _make(self, island: str) -> str:
        name = f"{self._attempt.run.name}-{self._attempt.number:04d}-{island}-{next(self._serial)}"
        self._groups[island] = name, make_group(self._one, name)
        return name

    def name_for(self, island: str) -> str:
        """Returns the name of the group that the next attempt of an island tries first; it may have to wait for its place."""
        return self._groups[island][0] if island in self._groups else self._make(island)

    def give_back(self, island: str) -> None:
        """Gives the group of an island back, if it has one. A cluster that is gone has taken it already."""
        if (found := self._groups.pop(island, None)) is not None:
            with contextlib.suppress(ray.exceptions.RayError, ConnectionError):
                remove_placement_group(found[1])

    def desk(self, stopped: Callable[[], bool], beat: Callable[[], None]) -> Gang | None:
        """Returns a place for the stages around training: a node of an island that does not train, else one that it waits for.

        Returns:
            None when `stopped` says so first.
        """
        wanted = self._one.on_nodes(1)
        for island, (_, group) in list(self._groups.items()):
            if group.wait(timeout_seconds=_LOST_S) and (gang := staff(self._attempt, group, wanted, is_own=False)) is not None:
                return gang
            # Its node is gone. What it still holds elsewhere must not be what this job waits for.
            self.give_back(island)
        return Placement(self._attempt, {**self._spec, "wanted": vars(wanted), "min_nodes": 1}).wait(stopped, beat)

    def close(self) -> None:
        """Gives everything back."""
        for island in list(self._groups):
            self.give_back(island)

    def _nodes(self) -> list[str]:
        """Returns the names of the nodes that the islands hold."""
        hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
        held = [placement_group_table(group)["bundles_to_node_id"].values() for _, group in self._groups.values()]
        return distinct([(hosts.get(node_id, "?"), node_id) for node_id in dict.fromkeys(itertools.chain.from_iterable(held))])
