"""Samples dealt to islands by global number: no sample is lost or seen twice while islands come and go.

The samples of a run are cut into leases of `steps` x `samples_per_step`. An island works through one lease after the other, each
begun at a known step, so which samples it sees at a step is a pure function of the deal. A deal holds until the membership
changes. The next one leaves leases that are under way to their islands, and deals first what was skipped and what a lost island
had not brought in. Deals are plain values: islands that hold the same one agree without talking.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

# Islands are at most one synchronisation apart, which is no longer than a lease.
_HELD = 2


@dataclass(frozen=True)
class Share:
    """One island's place in a deal.

    Args:
        begins: completed inner steps when its first lease of this deal begins.
        held: its last leases before that, the newest last: it may still be at them, for islands are not all at the same step.
    """

    begins: int
    held: tuple[int, ...] = ()


@dataclass(frozen=True)
class Deal:
    """Who gets which leases.

    Args:
        steps: inner steps of one lease.
        shares: by island; their order is that of the names.
        first: the lowest lease that was never dealt.
        again: leases to be dealt before it.
    """

    steps: int
    shares: Mapping[str, Share]
    first: int = 0
    again: tuple[int, ...] = ()

    @staticmethod
    def opening(steps: int, islands: Collection[str]) -> Deal:
        """Returns the deal of a run that begins."""
        return Deal(steps, {name: Share(0) for name in sorted(islands)})

    def lease_at(self, island: str, step: int) -> tuple[int, int]:
        """Returns the lease an island works on in the step after `step` completed ones, and how many steps of it are done."""
        share = self.shares[island]
        number, done = divmod(step - share.begins, self.steps)
        return share.held[number] if number < 0 else self._lease(self._slot(number, island)), done

    def next(self, step: int, islands: Collection[str], lost: Collection[str] = (), brought_in: int = 0) -> Deal:
        """Returns the deal that follows.

        Args:
            step: completed inner steps of the island that is furthest; what was begun before stays with its island.
            islands: members from now on; those that are new begin at once.
            lost: members until now whose work after step `brought_in` is gone.
            brought_in: step of the last synchronisation that the lost ones took part in.
        """
        dealt: set[int] = set()
        lost_leases: list[int] = []
        shares: dict[str, Share] = {}
        for name, share in self.shares.items():
            begun = max(0, -(-(step - share.begins) // self.steps))
            dealt |= {self._slot(number, name) for number in range(begun)}
            leases = (*share.held, *(self._lease(self._slot(number, name)) for number in range(begun)))
            ends = share.begins + begun * self.steps
            if name in islands:
                shares[name] = Share(ends, leases[-_HELD:])
            if name in lost:
                # The last one ends at `ends`, those before it a lease earlier each.
                lost_leases += [lease for back, lease in enumerate(reversed(leases)) if ends - back * self.steps > brought_in]
        for name in set(islands) - set(self.shares):
            shares[name] = Share(step)
        top = max(dealt, default=-1) + 1
        skipped = [self._lease(slot) for slot in range(top) if slot not in dealt]
        again = (*lost_leases, *skipped, *self.again[top:])
        first = self.first + max(0, top - len(self.again))
        return replace(self, shares=dict(sorted(shares.items())), first=first, again=tuple(sorted(again)))

    def _slot(self, number: int, island: str) -> int:
        names = sorted(self.shares)
        return number * len(names) + names.index(island)

    def _lease(self, slot: int) -> int:
        return self.again[slot] if slot < len(self.again) else self.first + slot - len(self.again)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Deal:
        shares = {name: Share(share["begins"], tuple(share["held"])) for name, share in value["shares"].items()}
        return Deal(value["steps"], shares, value["first"], tuple(value["again"]))


@dataclass(frozen=True)
class LeasedCursor:
    """An island's position in the order of samples; it stands where `data.loader.Cursor` stands in an ordinary run.

    Args:
        deal: who gets what.
        island: whose position it is.
        step: completed inner steps.
    """

    deal: Deal
    island: str
    step: int

    def take(self, count: int) -> tuple[list[int], LeasedCursor]:
        """Returns the numbers of the samples of one step, `count` of them, and the cursor after it."""
        lease, done = self.deal.lease_at(self.island, self.step)
        first = (lease * self.deal.steps + done) * count
        return list(range(first, first + count)), replace(self, step=self.step + 1)

    def to_json(self) -> dict[str, Any]:
        return {"deal": self.deal.to_json(), "island": self.island, "step": self.step}
