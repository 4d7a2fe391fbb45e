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
    """Which tensor and which part of it each tile is.

    Args:
        tensor: index of the tensor, int32 on the device, by tile.
        first: first element of the tile within it, int64, by tile.
        numel: elements of each tensor, int64, by tensor.
        count: number of tiles.
    """

    tensor: Tensor
    first: Tensor
    numel: Tensor
    count: int


@dataclass(frozen=True)
class Addresses:
    """Where tensors are.

    Args:
        table: int64 on the device, (quantities, tensors).
        aligned: whether every address is a multiple of 16 bytes, so that loads may be that wide.
    """

    table: Tensor
    aligned: bool


class AddressBook:
    """Builds the tables and keeps the last ones: weights and states never move, gradients often come to the same place."""

    def __init__(self) -> None:
        self._tiles: dict[tuple[tuple[int, ...], int, torch.device], Tiles] = {}
        self._addresses: dict[tuple[int, torch.device], tuple[tuple[int, ...], Addresses]] = {}

    def tiles(self, sizes: Sequence[int], tile: int, device: torch.device) -> Tiles:
        """Returns the tiles of tensors of `sizes` elements, cut every `tile` elements."""
        key = tuple(sizes), tile, device
        if key not in self._tiles:
            numel = torch.tensor(list(sizes), dtype=torch.int64)
            counts = (numel + tile - 1) // tile
            tensor = torch.repeat_interleave(torch.arange(len(sizes)), counts)
            start = torch.cumsum(counts, 0) - counts
            first = (torch.arange(len(tensor)) - start[tensor]) * tile
            self._tiles[key] = Tiles(tensor.to(torch.int32).to(device), first.to(device), numel.to(device), len(tensor))
        return self._tiles[key]

    def addresses(self, *quantities: Sequence[Tensor]) -> Addresses:
        """Returns the table of the addresses of tensors, all on one device; without waiting for the device."""
        device = quantities[0][0].device
        found = tuple(tensor.data_ptr() for tensors in quantities for tensor in tensors)
        known = self._addresses.get((len(quantities), device))
        if known is not None and known[0] == found:
            return known[1]
        host = torch.tensor(found, dtype=torch.int64).view(len(quantities), -1)
        if device.type == "cuda":
            host = host.pin_memory()
        fresh = Addresses(host.to(device, non_blocking=True), all(address % 16 == 0 for address in found))
        self._addresses[len(quantities), device] = found, fresh
        return fresh


BOOK = AddressBook()
