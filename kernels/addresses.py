"""Tables that tell a kernel where many tensors are, so that one launch serves all of them.

A table has one row a quantity and one column a tensor; tiles are numbered over all tensors, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Which tensor of a list and which part of it each tile is.

    Args:
        tensor: index of the tensor, int32 on the device, by tile.
        first: first element of the tile within it, int64, by tile.
        numel: elements of every tensor of the list, int64, by tensor.
        count: number of tiles.
    """

    tensor: Tensor
    first: Tensor
    numel: Tensor
    count: int


def by_alignment(*quantities: Sequence[Tensor]) -> list[tuple[bool, list[int]]]:
    """Returns which tensors allow loads of 16 bytes in all of `quantities` (True), and which do not; parts that are empty are left out.

    Args:
        quantities: lists of tensors, each of as many.
    """
    wide, narrow = list[int](), list[int]()
    for index, tensors in enumerate(zip(*quantities, strict=True)):
        fits = all(tensor.data_ptr() % 16 == 0 and tensor.numel() % 16 == 0 for tensor in tensors)
        (wide if fits else narrow).append(index)
    return [(fits, chosen) for fits, chosen in ((True, wide), (False, narrow)) if chosen]


class AddressBook:
    """Builds the tables and keeps the last ones: weights and states never move, gradients often come to the same place."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[tuple[int, ...], tuple[int, ...], int, torch.device], Tiles] = {}
        self._addresses: dict[tuple[int, int, torch.device], tuple[tuple[int, ...], Tensor]] = {}

    def tiles(self, sizes: Sequence[int], chosen: Sequence[int], tile: int, device: torch.device) -> Tiles:
        """Returns the tiles, cut every `tile` elements, of the chosen ones among tensors of `sizes` elements."""
        key = tuple(sizes), tuple(chosen), tile, device
        if key not in self._tiles:
            numel, index = torch.tensor(key[0], dtype=torch.int64), torch.tensor(key[1], dtype=torch.int64)
            counts = (numel[index] + tile - 1) // tile
            place = torch.repeat_interleave(torch.arange(len(index)), counts)
            first = (torch.arange(len(place)) - (torch.cumsum(counts, 0) - counts)[place]) * tile
            self._tiles[key] = Tiles(index[place].to(torch.int32).to(device), first.to(device), numel.to(device), len(place))
        return self._tiles[key]

    def addresses(self, *quantities: Sequence[Tensor]) -> Tensor:
        """Returns where tensors are, all on one device: int64 on it, (quantities, tensors); without waiting for the device."""
        device, count = quantities[0][0].device, len(quantities[0])
        found = tuple(tensor.data_ptr() for tensors in quantities for tensor in tensors)
        known = self._addresses.get((len(quantities), count, device))
        if known is not None and known[0] == found:
            return known[1]
        host = torch.tensor(found, dtype=torch.int64).view(len(quantities), count)
        fresh = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        self._addresses[len(quantities), count, device] = found, fresh
        return fresh


BOOK = AddressBook()
