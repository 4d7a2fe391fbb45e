"""What the ranks of an attempt were doing together when a collective timed out: PyTorch's flight recorder, read without torch.

Each rank writes `logs/nccl_trace_rank_N`: the collectives it entered, newest last, by process group. The first rank that
stopped is the one that did not enter a collective which others of its group wait in. Format: PyTorch, 'Flight Recorder
for Debugging Stuck Jobs' (version 2; one dict of plain containers, pickled).
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from factory_train.run_dir import Attempt

PREFIX = "nccl_trace_rank_"
# Two thousand entries with their stacks take about four megabytes.
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Collective:
    """One entry of a rank's recorder.

    Args:
        seq: number of the collective within its group, from 1.
        name: what was called ("nccl:all_reduce").
        sizes: of the inputs.
        is_over: whether it has come back.
        created_ns: when the rank called it, in nanoseconds since the epoch.
        where: file and line that called it, outside of torch.
    """

    seq: int
    name: str
    sizes: tuple[tuple[int, ...], ...]
    is_over: bool
    created_ns: int
    where: str

    @property
    def text(self) -> str:
        """The collective in words."""
        shapes = ", ".join("x".join(map(str, size)) or "scalar" for size in self.sizes)
        return f"{self.name} #{self.seq}" + (f" of {shapes}" if shapes else "") + (f" at {self.where}" if self.where else "")


@dataclass(frozen=True)
class Group:
    """A process group, as the recorders of its ranks show it.

    Args:
        name: its description, else its number.
        ranks: all its global ranks.
        entered: the newest collectives of each rank whose recorder was read, by their number.
    """

    name: str
    ranks: tuple[int, ...]
    entered: Mapping[int, Mapping[int, Collective]]

    def last(self, rank: int) -> Collective | None:
        """Returns the last collective a rank entered."""
        found = self.entered.get(rank)
        return found[max(found)] if found else None


@dataclass(frozen=True)
class Finding:
    """Which rank stopped first, and where.

    Args:
        ranks: those that stopped first; usually one.
        text: the finding in one line, for people.
    """

    ranks: tuple[int, ...]
    text: str


class _PlainOnly(pickle.Unpickler):
    """Reads containers, text and numbers; a file that asks for anything else, code above all, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a recorder holds plain values, and this file wants {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a recorder holds plain values, and this file refers to others")


def read_dump(path: Path) -> dict[str, Any]:
    """Returns what one rank wrote.

    Raises:
        ValueError: it is cut off, too large, or something else than plain containers.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name} is larger than a flight recorder writes")
    data = path.read_bytes()
    try:
        found = json.loads(data) if data[:1] == b"{" else _PlainOnly(io.BytesIO(data)).load()
    except Exception as error:
        # An unpickler raises whatever the bytes make it stumble over.
        raise ValueError(f"{path.name} is not a complete record: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("entries"), list):
        raise ValueError(f"{path.name} is not a flight recorder's")
    return found


def read_groups(attempt: Attempt) -> tuple[list[Group], list[str]]:
    """Returns the process groups that the records of an attempt tell of, and why records could not be read."""
    dumps: dict[int, dict[str, Any]] = {}
    unread = []
    for path in sorted((attempt.path / "logs").glob(f"{PREFIX}*")):
        rank = path.name.removeprefix(PREFIX)
        try:
            if rank.isdigit():
                dumps[int(rank)] = read_dump(path)
        except (OSError, ValueError) as error:
            unread.append(str(error))
    return groups_of(dumps), unread


def groups_of(dumps: Mapping[int, Mapping[str, Any]]) -> list[Group]:
    """Returns the process groups of all ranks' records, the busiest first."""
    # A name may stand for other ranks elsewhere (the groups of a mesh), so the ranks are part of what a group is.
    entered: dict[tuple[str, tuple[int, ...]], dict[int, dict[int, Collective]]] = {}
    described: dict[tuple[str, tuple[int, ...]], str] = {}
    for rank, dump in dumps.items():
        # Gloo leaves the name of the default group, "0", empty.
        members = {str(config.get("name") or key or "0"): _ranks(config.get("ranks")) for key, config in dump.get("pg_config", {}).items()}
        for name, ranks in members.items():
            entered.setdefault((name, ranks), {}).setdefault(rank, {})
        for entry in dump["entries"]:
            name, text = map(str, entry["process_group"])
            group = (name, members.get(name, ()))
            described[group] = text if text not in ("", "undefined") else f"group {name}"
            of_rank = entered.setdefault(group, {}).setdefault(rank, {})
            if not entry.get("is_p2p"):
                found = _collective(entry)
                of_rank[found.seq] = found
    groups = [
        Group(described[key], key[1] or tuple(sorted(by_rank)), {rank: found for rank, found in by_rank.items() if found})
        for key, by_rank in entered.items()
        if key in described
    ]
    return sorted(groups, key=lambda group: -sum(map(len, group.entered.values())))


def _ranks(text: Any) -> tuple[int, ...]:
    """Returns the ranks of a group: a list, or its text, "[0, 1]"."""
    return tuple(int(number) for number in re.findall(r"\d+", str(text or "")))


def _collective(entry: Mapping[str, Any]) -> Collective:
    return Collective(
        seq=int(entry["collective_seq_id"]),
        name=str(entry["profiling_name"]),
        sizes=tuple(tuple(map(int, size)) for size in entry.get("input_sizes") or ()),
        # Gloo leaves the state as it was, and retires what is over.
        is_over=entry.get("state") == "completed" or bool(entry.get("retired")),
        created_ns=int(entry.get("time_created_ns") or 0),
        where=_where(entry.get("frames") or ()),
    )


def _where(frames: Sequence[Mapping[str, Any]]) -> str:
    outside = (frame for frame in frames if "/torch/" not in str(frame.get("filename", "")))
    frame = next(outside, None)
    return f"{Path(str(frame['filename'])).name}:{frame['line']}" if frame else ""


def first_stopped(groups: Sequence[Group]) -> Finding | None:
    """Returns which rank stopped first; None where all ranks are in the same collectives of every group."""
    found = [item for group in groups if (item := _behind(group) or _mismatch(group) or _together(group))]
    # What is stuck in one group soon keeps the others waiting: the oldest wait is the cause.
    return min(found, key=lambda item: item[0])[1] if found else None


def _behind(group: Group) -> tuple[int, Finding] | None:
    """Returns the ranks that did not enter what others wait in, and when the first of those began to wait."""
    last = {rank: collective.seq if (collective := group.last(rank)) else 0 for rank in group.entered}
    silent = [rank for rank in group.ranks if rank not in last]
    if not last or (min(last.values()) == max(last.values()) and not silent):
        return None
    if silent and min(last.values()) == max(last.values()) and all(group.entered[rank][seq].is_over for rank, seq in last.items() if seq):
        return None
    behind = silent or [rank for rank, seq in last.items() if seq == min(last.values())]
    waiting = sorted(set(last) - set(behind))
    missed = max(last.values()) if silent else min(last.values()) + 1
    waits = [group.entered[rank][missed] for rank in waiting if missed in group.entered[rank]]
    if not waits:
        # So far behind that the others' recorders have forgotten it.
        waits = [collective for rank in waiting if (collective := group.last(rank))]
    first = min(waits, key=lambda collective: collective.created_ns)
    did = "left no record of" if silent else "did not enter"
    before = "" if silent else _before(group, behind[0])
    return first.created_ns, Finding(
        tuple(behind), f"{_name(behind)} {did} {first.text} of {group.name}, which {_name(waiting)} {_verb(waiting)} in{before}"
    )


def _before(group: Group, rank: int) -> str:
    last = group.last(rank)
    return f"; its last was {last.text}" if last else ""


def _mismatch(group: Group) -> tuple[int, Finding] | None:
    """Returns the ranks that called something else than the others."""
    common = sorted(set.intersection(*(set(found) for found in group.entered.values()))) if group.entered else []
    for seq in common:
        kinds: dict[tuple[str, Any], list[int]] = {}
        for rank, found in group.entered.items():
            # Gather, scatter and all-to-all may well have other sizes on every rank.
            sizes = found[seq].sizes if "all_reduce" in found[seq].name else None
            kinds.setdefault((found[seq].name, sizes), []).append(rank)
        if len(kinds) > 1:
            few = min(kinds.values(), key=len)
            other = next(ranks for ranks in kinds.values() if ranks is not few)
            odd, usual = group.entered[few[0]][seq], group.entered[other[0]][seq]
            text = f"{_name(few)} called {odd.text} of {group.name} where {_name(other)} called {usual.text}"
            return min(odd.created_ns, usual.created_ns), Finding(tuple(few), text)
    return None


def _together(group: Group) -> tuple[int, Finding] | None:
    """Returns the collective that all ranks have entered and none has left: then it is the network."""
    last = [group.last(rank) for rank in group.ranks]
    waits = [collective for collective in last if collective is not None and not collective.is_over]
    if not waits or len(waits) < len(last):
        return None
    return waits[0].created_ns, Finding((), f"every rank is in {waits[0].text} of {group.name}: the network between them, not a rank")


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _verb(ranks: Sequence[int]) -> str:
    return "wait" if len(ranks) > 1 else "waits"


def explain(attempt: Attempt) -> str | None:
    """Returns the finding of an attempt's records in one line; None where there are none, or they say nothing."""
    groups, _ = read_groups(attempt)
    found = first_stopped(groups)
    return found.text if found else None
