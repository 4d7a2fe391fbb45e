"""The rules by which islands agree on who takes part: decisions from what is on the board, without clocks or files of their own.

One island holds the coordinator's lease and makes epochs. When it is gone, the first living member takes the lease over. An
epoch that nobody has left is never replaced by itself: a new one is made when a round failed, or when a round's notices said
that islands will join after it.

Where a round failed though all its members live, the way between some of them may be cut. Each finds out whom it reaches. What
is not mended within the grace time parts the islands: the largest set of islands that all reach each other goes on; of several
that are as large, one with the coordinator, then the one with the first names. The others join again when they reach all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from factory_train.distributed.board import BROKEN, JOINING, LEFT, Beat, Epoch, Lease

# Whoever has not found out by then whom it reaches counts as one that reaches all.
ASKING_S = 10.0
_FINDING_OUT_S = 4.0
# Parts of it: answers to hails are awaited for half of it, signs of life of others that noticed for so long, and at its end members meet.
_SETTLING, _MEETING = 3 / 4, 1 / 8
# Where the grace time is short, no more than this part of it.
_MOST_OF_GRACE = 0.25


def finding_out_s(grace_s: float) -> float:
    """Returns what part of a grace time is kept for finding out what has happened, in seconds: a round fails so long before its end."""
    return min(_FINDING_OUT_S, _MOST_OF_GRACE * grace_s)


@dataclass(frozen=True)
class Rules:
    """When an island counts as gone, and how many are enough.

    Args:
        islands: names of all that may take part.
        quorum: fewest members of an epoch.
        silence_s: an island without a sign of life for so long is gone.
        grace_s: how long training waits for a member that lives, or that cannot be reached; and all for each other at the start.
    """

    islands: tuple[str, ...]
    quorum: int = 1
    silence_s: float = 10.0
    grace_s: float = 60.0

    @property
    def settle_s(self) -> float:
        """How long those that noticed a failure are given to say so, however long they have waited before."""
        return _SETTLING * finding_out_s(self.grace_s)

    @property
    def patience_s(self) -> float:
        """How long those that wait do so before they give others up: members meet again within the grace time then."""
        return self.grace_s - _MEETING * finding_out_s(self.grace_s)


@dataclass(frozen=True)
class View:
    """What one island sees at one moment.

    Args:
        now: on its own monotonic clock, in seconds.
        beats: newest signs of life.
        silent_s: how long ago each last moved.
        epoch, lease: the newest ones.
    """

    now: float
    beats: Mapping[str, Beat]
    silent_s: Mapping[str, float]
    epoch: Epoch | None
    lease: Lease | None

    def lives(self, island: str, incarnation: int, silence_s: float) -> bool:
        """Returns whether this incarnation of an island is there."""
        beat = self.beats.get(island)
        return beat is not None and beat.incarnation == incarnation and beat.state != LEFT and self.silent_s[island] <= silence_s


@dataclass(frozen=True)
class Decision:
    """What an island does now.

    Args:
        take_lease: number of the coordinator's lease to take.
        start: islands of an epoch that begins cold.
        survivors: islands of the epoch that follows a failed one; empty for none.
        lost: members that are not among them, each with the reason.
        admit: islands that may join after the next round.
    """

    take_lease: int | None = None
    start: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    admit: tuple[str, ...] = ()


class Coordination:
    """Decides for one island.

    Args:
        rules: see there.
        island, incarnation: who decides.
    """

    def __init__(self, rules: Rules, island: str, incarnation: int) -> None:
        self._rules, self._island, self._incarnation = rules, island, incarnation
        # The epoch that failed, when that was first seen, and since when its members wait; and since when islands are waited for.
        self._failed: tuple[int, float, float] | None = None
        self._waiting_since: float | None = None

    def decide(self, view: View) -> Decision:
        """Returns what to do; call it again and again."""
        if not self._coordinates(view):
            self._failed = self._waiting_since = None
            return Decision(take_lease=(view.lease.number if view.lease else 0) + 1) if self._is_next(view) else Decision()
        members = self._living_members(view)
        if view.epoch is None or not members:
            return self._start(view)
        self._waiting_since = None
        broken = [name for name in members if view.beats[name].state == BROKEN and view.beats[name].epoch == view.epoch.number]
        if broken:
            return self._after_failure(view, view.epoch, members, broken)
        joining = [name for name in self._joining(view) if not view.epoch.has(name, view.beats[name].incarnation)]
        # One that does not reach all members would only make the next epoch fail.
        return Decision(admit=tuple(name for name in joining if {*view.epoch.members} - {name} <= {*(view.beats[name].reaches or ())}))

    def _coordinates(self, view: View) -> bool:
        lease = view.lease
        return lease is not None and (lease.island, lease.incarnation) == (self._island, self._incarnation)

    def _is_next(self, view: View) -> bool:
        """Whether nobody coordinates and it is for this island to begin."""
        living = self._living_members(view)
        holder = view.lease
        if holder is not None and view.lives(holder.island, holder.incarnation, self._rules.silence_s) and (
            not living or holder.island in living
        ):  # fmt: skip
            return False
        return bool(candidates := living or self._joining(view)) and candidates[0] == self._island

    def _living_members(self, view: View) -> list[str]:
        """Members of the newest epoch that are there; one that still joins has nothing to go on with yet."""
        members = view.epoch.members if view.epoch else {}
        return [
            name
            for name, incarnation in sorted(members.items())
            if view.lives(name, incarnation, self._rules.silence_s)
            and not (view.beats[name].state == JOINING and view.epoch is not None and name in view.epoch.joining)
        ]

    def _joining(self, view: View) -> list[str]:
        return [
            name
            for name, beat in sorted(view.beats.items())
            if beat.state == JOINING and name in self._rules.islands and view.lives(name, beat.incarnation, self._rules.silence_s)
        ]

    def _start(self, view: View) -> Decision:
        """Begins once all are there, or enough after the grace time."""
        if self._waiting_since is None:
            self._waiting_since = view.now
        joining = tuple(self._joining(view))
        waited = view.now - self._waiting_since > self._rules.grace_s
        enough = len(joining) == len(self._rules.islands) or (waited and len(joining) >= self._rules.quorum)
        return Decision(start=joining) if enough else Decision()

    def _after_failure(self, view: View, epoch: Epoch, members: list[str], broken: list[str]) -> Decision:
        """Goes on with those that report the failure and reach each other; what may change is waited for as long as the grace time."""
        waits_since = view.now - max(view.beats[name].waited_s for name in broken)
        if self._failed is None or self._failed[0] != epoch.number:
            self._failed = epoch.number, view.now, waits_since
        _, seen_at, waits_since = self._failed = (*self._failed[:2], min(self._failed[2], waits_since))
        patient = view.now - waits_since <= self._rules.patience_s or view.now - seen_at <= self._rules.settle_s
        late = [name for name in members if name not in broken]
        if late and patient:
            return Decision()
        lost = {name: "late" if name in late else self._reason(view, epoch, name) for name in sorted(set(epoch.members) - set(broken))}
        together = tuple(broken)
        if not lost:
            reaches = {name: view.beats[name].reaches for name in broken}
            if view.now - seen_at <= ASKING_S and any(found is None for found in reaches.values()):
                return Decision()
            together = largest_whole(reaches, self._island)
            if together != tuple(broken) and patient:
                return Decision()
            lost = {name: "cannot reach all others" for name in broken if name not in together}
        return Decision(survivors=together, lost=lost) if len(together) >= self._rules.quorum else Decision()

    def _reason(self, view: View, epoch: Epoch, island: str) -> str:
        beat = view.beats.get(island)
        if beat is None or beat.incarnation != epoch.members[island] or beat.state == JOINING:
            return "restarted"
        return "left" if beat.state == LEFT else f"silent for {self._rules.silence_s:g} s"


def largest_whole(reaches: Mapping[str, Sequence[str] | None], coordinator: str) -> tuple[str, ...]:
    """Returns the islands that go on where some do not reach each other, in the order of their names.

    Args:
        reaches: whom each reaches; None where that is not known, and nothing speaks against it.
        coordinator: who decides between sets of the same size.
    """
    names = sorted(reaches)

    def meet(a: str, b: str) -> bool:
        return all(there is None or other in there for there, other in ((reaches[a], b), (reaches[b], a)))

    cut = {pair for pair in itertools.combinations(names, 2) if not meet(*pair)}
    for size in range(len(names), 0, -1):
        whole = [some for some in itertools.combinations(names, size) if not any(pair in cut for pair in itertools.combinations(some, 2))]
        if whole:
            return min(whole, key=lambda some: coordinator not in some)
    return ()
