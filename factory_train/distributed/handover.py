"""What members of a new epoch give each other before its first round: results that some lack, and the state of those that join."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from factory_train.distributed.board import Epoch
from factory_train.distributed.encoded_reduce import Reduced, RoundFailedError
from factory_train.distributed.gloo_wire import GlooWire
from factory_train.distributed.outer_state import OuterState

_JOINING = -2


@dataclass(frozen=True)
class Standing:
    """Where one rank of an island stands.

    Args:
        island: its island.
        completed: the last round it has applied.
        last: number and result of that round, where this rank still has it.
        due: number and fragment of the round under way, if there is one.
        state: what it sends to those that join, or receives.
        print_of: fingerprint of a fragment.
    """

    island: str
    completed: int
    last: tuple[int, Reduced] | None
    due: tuple[int, int] | None
    state: OuterState
    print_of: Callable[[int], int]


def catch_up(mine: Standing, epoch: Epoch, wire: GlooWire) -> Reduced | None:
    """Brings all members to the same round; all call it.

    A round may have come to its end for some members and not for others. Those that have its result keep it until the next
    one, and give it to the others: what some have applied, all apply.

    Returns:
        The result of the round under way, where others have it already.

    Raises:
        RoundFailedError: members are more than a round apart, or the state arrived damaged.
        RuntimeError: a member is gone.
    """
    if wire.size == 1:
        return None
    names = sorted(epoch.members)
    told = torch.empty(wire.size, 8, dtype=torch.uint8)
    number = _JOINING if mine.island in epoch.joining else mine.completed
    wire.all_gather(told, torch.tensor([number], dtype=torch.int64).view(torch.uint8))
    completed = dict(zip(names, told.view(torch.int64).view(-1).tolist(), strict=True))
    newest = max(completed.values())
    holder = next(name for name in names if completed[name] == newest)
    caught = None
    for name in names:
        if name in epoch.joining:
            _give_state(mine, wire, names.index(epoch.donor), names.index(name))
        elif completed[name] < newest:
            if completed[name] < newest - 1:
                raise RoundFailedError(f"{name} is {newest - completed[name]} rounds behind", where="diloco")
            caught = _give_result(mine, wire, names.index(holder), names.index(name), newest) or caught
    return caught


def _give_state(mine: Standing, wire: GlooWire, donor: int, joiner: int) -> None:
    if wire.rank not in (donor, joiner):
        return
    for fragment in range(len(mine.state)):
        tensors = mine.state.tensors(fragment)
        if wire.rank == donor:
            for tensor in (*tensors, torch.tensor([mine.print_of(fragment)], dtype=torch.int64)):
                wire.send(tensor.cpu(), joiner)
            continue
        fingerprint = torch.zeros(1, dtype=torch.int64)
        for tensor in (*tensors, fingerprint):
            host = torch.empty_like(tensor, device="cpu")
            wire.receive(host, donor)
            tensor.copy_(host)
        if mine.state.fingerprint(fragment) != int(fingerprint):
            raise RoundFailedError(f"fragment {fragment} arrived damaged", where=f"island {mine.island}")


def _give_result(mine: Standing, wire: GlooWire, holder: int, lacking: int, number: int) -> Reduced | None:
    if wire.rank == holder:
        assert mine.last is not None
        assert mine.last[0] == number, (mine.last[0], number)
        reduced = mine.last[1]
        wire.send(torch.tensor([reduced.codes is not None], dtype=torch.int64), lacking)
        for tensor in (reduced.codes, reduced.scales):
            if tensor is not None and tensor.numel():
                wire.send(tensor, lacking)
    elif wire.rank == lacking:
        assert mine.due is not None
        assert mine.due[0] == number, (mine.due, number)
        there = torch.zeros(1, dtype=torch.int64)
        wire.receive(there, holder)
        if not there.item():
            return Reduced(None, None, ())
        codes, scales = mine.state.room(mine.due[1])
        for tensor in (codes, scales):
            if tensor.numel():
                wire.receive(tensor, holder)
        return Reduced(codes, scales, ())
    return None
