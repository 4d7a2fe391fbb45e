"""What islands tell each other: signs of life, the coordinator's lease, and the epochs; through a folder, or over TCP (`tcp_board`).

Every record has one writer, or is written once. Clocks of different machines are never compared: a sign of life is a counter, and
whoever looks notes on its own clock when it last moved.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from factory_train.rendezvous.records import FolderRecords, Records

if TYPE_CHECKING:
    import torch.distributed as dist

# What an island says of itself.
JOINING, MEMBER, BROKEN, LEFT = "joining", "member", "broken", "left"


@dataclass(frozen=True)
class Beat:
    """A sign of life of an island.

    Args:
        island: its name.
        incarnation: number of its attempt: a restarted island is another one.
        count: grows with every sign.
        state: joining (it is in no epoch), member, broken (its round in `epoch` failed), left (it will not come back by itself).
        epoch: the newest one it has entered; 0 for none.
        number: the last round it has completed; -1 for none.
        step: completed inner steps.
        layout: what must be equal on all islands.
        resumes: steps of its own checkpoints, for a start from them.
        address: where it can be hailed (`reach.Reach`).
        waited_s: how long training has waited, since before its round failed; 0 while none has.
        reaches: islands it found that it can reach since its state is what it is; None while it does not know.
        gave_up: the newest epoch in which it no longer waits for the others, because one gives no sign of life; for its other ranks.
        outer: where islands have several run directories, the deals of the checkpoints of its own run, by step: it can begin there.
    """

    island: str
    incarnation: int
    count: int = 0
    state: str = JOINING
    epoch: int = 0
    number: int = -1
    step: int = 0
    layout: str = ""
    resumes: tuple[int, ...] = ()
    address: str = ""
    waited_s: float = 0.0
    reaches: Sequence[str] | None = None
    gave_up: int = 0
    outer: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """A membership: who takes part in rounds until the next one.

    Args:
        number: from 1, without gaps; written once.
        lease: of the coordinator that made it.
        members: incarnation of each island, in the order of their names.
        joining: those that receive the state of another member before anything else.
        completed: the last round that some member has completed; -1 for none.
        step: completed inner steps at which those that join begin.
        cold: whether all members begin from a checkpoint, or from the beginning where `step` is 0.
        deal: which samples are whose (`data.leases.Deal` as JSON).
        why: what has happened, for people.
    """

    number: int
    lease: int
    members: Mapping[str, int]
    joining: tuple[str, ...] = ()
    completed: int = -1
    step: int = 0
    cold: bool = False
    deal: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def has(self, island: str, incarnation: int) -> bool:
        """Returns whether this very incarnation of an island is a member."""
        return self.members.get(island) == incarnation

    def place(self, island: str) -> int:
        """Returns the place of a member in the order of all."""
        return sorted(self.members).index(island)

    @property
    def donor(self) -> str:
        """The member whose state those that join receive."""
        return next(name for name in sorted(self.members) if name not in self.joining)

    def leader(self, islands: Collection[str]) -> str | None:
        """Returns the member among `islands` that writes and judges for them, if there is one: who did not just join goes first."""
        return min(self.members.keys() & set(islands), key=lambda name: (name in self.joining, name), default=None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Epoch:
        return Epoch(**{**value, "joining": tuple(value["joining"])})


@dataclass(frozen=True)
class Lease:
    """Who coordinates; the highest number counts."""

    number: int
    island: str
    incarnation: int


@dataclass(frozen=True)
class Told:
    """Where an island was when it was told to stop.

    Args:
        step: completed inner steps.
        near: whether its next round was near enough to stop behind it.
    """

    step: int
    near: bool


class Board(ABC):
    """What all islands of a run see.

    Every method raises OSError where the board cannot be reached for the moment.

    Args:
        records: where it is kept.
    """

    def __init__(self, records: Records) -> None:
        self._records = records

    def write_beat(self, beat: Beat) -> None:
        """Replaces the island's sign of life; a crash of the machine may lose it, so it is not synced to the disk."""
        self._records.replace("beats", beat.island, asdict(beat))

    def beats(self) -> dict[str, Beat]:
        """Returns the newest sign of every island that ever gave one."""
        found = self._records.all("beats")
        return {name: Beat(**{**value, "resumes": tuple(value["resumes"])}) for name, value in found.items()}

    def has_given_up(self, island: str, incarnation: int, epoch: int) -> bool:
        """Returns whether an island no longer waits for the others in an epoch."""
        beat = self.beats().get(island)
        return beat is not None and (beat.incarnation, beat.gave_up) == (incarnation, epoch)

    def write_stop(self, island: str, incarnation: int, told: Told) -> None:
        """Says that an island was told to stop."""
        self._records.replace("stops", island, {"incarnation": incarnation, **asdict(told)})

    def stops(self, islands: Mapping[str, int]) -> dict[str, Told]:
        """Returns what each of these islands said when it was told to stop, if it was.

        Args:
            islands: incarnation of each.
        """
        said = {name: value for name, value in self._records.all("stops").items() if name in islands}
        return {name: Told(value["step"], value["near"]) for name, value in said.items() if value["incarnation"] == islands[name]}

    def take_lease(self, lease: Lease) -> bool:
        """Takes the coordinator's lease of that number; False when another island was faster."""
        return self._records.create("leases", lease.number, asdict(lease))

    def lease(self) -> Lease | None:
        """Returns the lease that counts."""
        value = self._records.newest("leases")
        return Lease(**value) if value else None

    def publish(self, epoch: Epoch) -> bool:
        """Makes an epoch known; False when there is one of that number."""
        return self._records.create("epochs", epoch.number, epoch.to_json())

    def epoch(self) -> Epoch | None:
        """Returns the newest epoch."""
        value = self._records.newest("epochs")
        return Epoch.from_json(value) if value else None

    @abstractmethod
    def store(self, epoch: Epoch, rank: int, timeout: datetime.timedelta) -> dist.Store:
        """Returns where ranks `rank` of all members of an epoch find each other, waiting `timeout` for what is not there yet."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the board. May be called twice."""


class FolderBoard(Board):
    """The board in a folder that all islands see.

    Args:
        folder: below the run directory; for somebody who only looks it need not be there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(FolderRecords(folder))
        self._folder = folder

    def store(self, epoch: Epoch, rank: int, timeout: datetime.timedelta) -> dist.Store:
        """See `Board`."""
        # `status` reads boards, and needs no torch.
        import torch.distributed as dist

        path = self._folder / "epochs" / f"{epoch.number:06d}.rank-{rank:05d}.store"
        # FileStore waits for a folder that is not there.
        path.parent.mkdir(parents=True, exist_ok=True)
        store = dist.FileStore(str(path), len(epoch.members))
        store.set_timeout(timeout)
        return store

    def close(self) -> None:
        """See `Board`; files are not held open."""
