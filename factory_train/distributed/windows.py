"""Windows over a flat fragment: so many whole blocks at a time, with the pieces of parameters that lie in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from factory_train.kernels import pseudogradient as kernels


@dataclass(frozen=True)
class Window:
    """Some whole blocks of a fragment, the last one maybe short.

    Args:
        start, stop: its elements in the fragment.
        pieces: of each parameter in it the name, where it lies in the flat shard, and where in the window.
    """

    start: int
    stop: int
    pieces: tuple[tuple[str, slice, slice], ...]

    @property
    def elements(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def blocks(self) -> slice:
        return slice(self.start // kernels.BLOCK, kernels.num_blocks(self.stop))

    def code_bytes(self, format: str) -> slice:
        return slice(self.blocks.start * kernels.CODE_BYTES[format], self.blocks.stop * kernels.CODE_BYTES[format])

    def gather(self, flats: Mapping[str, torch.Tensor], *, read: bool = True) -> torch.Tensor:
        """Returns the parameters' elements in it: the shard itself where it is of one parameter, else a copy.

        Args:
            flats: each parameter's shard, flat.
            read: whether anybody looks at them before they are overwritten.
        """
        pieces = [flats[name][of_shard] for name, of_shard, _ in self.pieces]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if read else pieces[0].new_empty(self.stop - self.start)

    def scatter(self, inner: torch.Tensor, flats: Mapping[str, torch.Tensor]) -> None:
        """Brings what became of what `gather` returned back to the shards."""
        if len(self.pieces) > 1:
            shards = [flats[name][of_shard] for name, of_shard, _ in self.pieces]
            torch._foreach_copy_(shards, [inner[of_window] for _, _, of_window in self.pieces])


def cut(places: Mapping[str, tuple[int, int]], longest: int, alone: int) -> list[Window]:
    """Returns the windows of a fragment, in its order.

    Blocks of one parameter are windows of their own where there are enough of them, for those need no copying.

    Args:
        places: first element and number of elements of each parameter, one after the other.
        longest: blocks of a window, at most.
        alone: so many blocks of one parameter are enough.
    """
    numel = sum(size for _, size in places.values())
    ranges, begun = [], 0
    for first, size in places.values():
        start, end = -(-first // kernels.BLOCK) * kernels.BLOCK, first + size
        stop = end if end == numel else end // kernels.BLOCK * kernels.BLOCK
        if stop - start >= alone * kernels.BLOCK:
            ranges += [(begun, start), (start, stop)]
            begun = stop
    return [window for start, stop in [*ranges, (begun, numel)] for window in _windows(places, start, stop, longest * kernels.BLOCK)]


def _windows(places: Mapping[str, tuple[int, int]], start: int, stop: int, size: int) -> Iterator[Window]:
    for begin in range(start, stop, size):
        end = min(begin + size, stop)
        yield Window(begin, end, tuple(_pieces(places, begin, end)))


def _pieces(places: Mapping[str, tuple[int, int]], start: int, stop: int) -> Iterator[tuple[str, slice, slice]]:
    for name, (first, size) in places.items():
        begin, end = max(start, first), min(stop, first + size)
        if begin < end:
            yield name, slice(begin - first, end - first), slice(begin - start, end - start)
