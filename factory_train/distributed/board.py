"""What islands tell each other through a shared folder: signs of life, the coordinator's lease, and the epochs.

Every file has one writer, or is written once. Clocks of different machines are never compared: a sign of life is a counter, and
whoever looks notes on its own clock when it last moved.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from factory_train import storage

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
        waited_s: how long training has waited already when its round failed.
        reaches: islands it found that it can reach since its state is what it is; None while it does not know.
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


class FolderBoard:
    """The board in a folder that all islands see.

    Args:
        folder: below the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("beats", "leases", "epochs"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def reading(folder: Path) -> FolderBoard:
        """Returns a board for somebody who only looks; there need not be one yet."""
        board = FolderBoard.__new__(FolderBoard)
        board.folder = folder
        return board

    def write_beat(self, beat: Beat) -> None:
        """Replaces the island's sign of life; a crash of the machine may lose it, so it is not synced to the disk."""
        path = self.folder / "beats" / f"{beat.island}.json"
        storage.replace_json(path, asdict(beat))

    def beats(self) -> dict[str, Beat]:
        """Returns the newest sign of every island that ever gave one."""
        found = {}
        for path in sorted((self.folder / "beats").glob("*.json")):
            value = storage.read_json(path)
            if value is not None:
                found[value["island"]] = Beat(**{**value, "resumes": tuple(value["resumes"])})
        return found

    def take_lease(self, lease: Lease) -> bool:
        """Takes the coordinator's lease of that number; False when another island was faster."""
        return storage.write_json_once(self._numbered("leases", lease.number), asdict(lease))

    def lease(self) -> Lease | None:
        """Returns the lease that counts."""
        value = self._newest("leases")
        return Lease(**value) if value else None

    def publish(self, epoch: Epoch) -> bool:
        """Makes an epoch known; False when there is one of that number."""
        return storage.write_json_once(self._numbered("epochs", epoch.number), epoch.to_json())

    def epoch(self) -> Epoch | None:
        """Returns the newest epoch."""
        value = self._newest("epochs")
        return Epoch.from_json(value) if value else None

    def store_path(self, epoch: int, rank: int) -> Path:
        """Returns the file in which ranks `rank` of all members of an epoch find each other."""
        return self.folder / "epochs" / f"{epoch:06d}.rank-{rank:05d}.store"

    def _numbered(self, kind: str, number: int) -> Path:
        return self.folder / kind / f"{number:06d}.json"

    def _newest(self, kind: str) -> Any:
        folder = self.folder / kind
        numbers = [int(name[:6]) for name in (os.listdir(folder) if folder.is_dir() else ()) if re.fullmatch(r"\d{6}\.json", name)]
        return storage.read_json(self._numbered(kind, max(numbers))) if numbers else None
