"""Tables that tell a kernel where many tensors are, so that one launch serves all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Which tensor of a list and which part of it each tile is.

    Args:
        aligned: whether all addresses and sizes of these tensors are multiples of 16, so that accesses may be of 16 bytes.
        tensor: index of the tensor, int32 on the device, by tile.
        first: first element of the tile within it, int64, by tile.
        numel: elements of all these tensors.
        count: number of tiles.
    """

    aligned: bool
    tensor: Tensor
    first: Tensor
    numel: int
    count: int


@dataclass(frozen=True)
class Table:
    """Where tensors are.

    Args:
        addresses: int64 on the device, (quantities, tensors).
        sizes: elements of each tensor, int64.
        parts: tiles of those that are aligned, and of those that are not; a part without tensors is left out.
    """

    addresses: Tensor
    sizes: Tensor
    parts: tuple[Tiles, ...]


class AddressBook:
    """Builds the tables and keeps the last ones: weights and states never move, gradients often come to the same place."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int, int, torch.device], tuple[tuple[int, ...], Table]] = {}
        self._tiles: dict[tuple[bool, tuple[int, ...], tuple[int, ...], int, torch.device], Tiles] = {}
        self._sizes: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def table(self, quantities: Sequence[Sequence[Tensor]], wide: Sequence[int], tile: int) -> Table:
        """Returns the table of lists of tensors, all on one device; without waiting for the device.

        Args:
            quantities: lists of equally many tensors; sizes are those of the first list.
            wide: which of the lists are read 16 bytes at a time where possible.
            tile: elements of a tile.
        """
        device, count = quantities[0][0].device, len(quantities[0])
        sizes = tuple(tensor.numel() for tensor in quantities[0])
        places = [[tensor.data_ptr() for tensor in tensors] for tensors in quantities]
        found = (*sizes, *(place for row in places for place in row))
        key = len(quantities), count, tile, device
        known = self._tables.get(key)
        if known is not None and known[0] == found:
            return known[1]
        fits = [size % 16 == 0 and all(places[row][index] % 16 == 0 for row in wide) for index, size in enumerate(sizes)]
        parts = [(aligned, tuple(index for index in range(count) if fits[index] == aligned)) for aligned in (True, False)]
        host = torch.tensor(places, dtype=torch.int64)
        table = Table(
            (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True),
            self._kept_sizes(sizes, device),
            tuple(self._kept_tiles(aligned, sizes, chosen, tile, device) for aligned, chosen in parts if chosen),
        )
        self._tables[key] = found, table
        return table

    def _kept_sizes(self, sizes: tuple[int, ...], device: torch.device) -> Tensor:
        if (sizes, device) not in self._sizes:
            self._sizes[sizes, device] = torch.tensor(sizes, dtype=torch.int64).to(device)
        return self._sizes[sizes, device]

    def _kept_tiles(self, aligned: bool, sizes: tuple[int, ...], chosen: tuple[int, ...], tile: int, device: torch.device) -> Tiles:
        key = aligned, sizes, chosen, tile, device
        if key not in self._tiles:
            index = torch.tensor(chosen, dtype=torch.int64)
            numel = torch.tensor(sizes, dtype=torch.int64)[index]
            counts = (numel + tile - 1) // tile
            place = torch.repeat_interleave(torch.arange(len(index)), counts)
            first = (torch.arange(len(place)) - (torch.cumsum(counts, 0) - counts)[place]) * tile
            tensor = index[place].to(torch.int32)
            self._tiles[key] = Tiles(aligned, tensor.to(device), first.to(device), int(numel.sum()), len(place))
        return self._tiles[key]


BOOK = AddressBook()
