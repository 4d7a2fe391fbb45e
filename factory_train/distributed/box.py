"""Boxes: which part of a whole tensor a rank holds, whatever spread it over the ranks.

A checkpoint addresses every tensor by name, global shape and box, so what one strategy saved another can load by
intersecting boxes. All that depends on how DTensor splits a tensor is in this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Checkpoints are listed and verified without torch, and boxes are all that needs.
    import torch
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor: `offset[d] <= index[d] < offset[d] + shape[d]`, in elements."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.offset) == len(self.shape), self

    @staticmethod
    def whole(shape: tuple[int, ...]) -> Box:
        """Returns the box of a whole tensor."""
        return Box((0,) * len(shape), tuple(shape))

    @property
    def end(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements; a scalar has one."""
        return math.prod(self.shape)

    def is_within(self, shape: tuple[int, ...]) -> bool:
        """Returns whether the box lies inside a tensor of `shape`."""
        return (
            len(shape) == len(self.shape)
            and min((*self.offset, *self.shape), default=0) >= 0
            and all(end <= size for end, size in zip(self.end, shape, strict=True))
        )

    def intersection(self, other: Box) -> Box | None:
        """Returns the elements in both boxes, or None when there are none."""
        offset = tuple(map(max, self.offset, other.offset))
        shape = tuple(min(a, b) - start for a, b, start in zip(self.end, other.end, offset, strict=True))
        return None if any(size <= 0 for size in shape) else Box(offset, shape)

    def slices(self, within: Box) -> tuple[slice, ...]:
        """Returns the index that picks this box out of a tensor that holds `within`."""
        starts = [start - base for start, base in zip(self.offset, within.offset, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.shape, strict=True))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what this rank holds of `tensor`: its shard of a DTensor, or the tensor itself.

    The result shares memory with `tensor`. Ask for FSDP2 parameters between optimizer steps: during forward and
    backward passes they are gathered.
    """
    import torch

    if not _is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def local_box(tensor: torch.Tensor) -> tuple[Box, tuple[int, ...]]:
    """Returns the box this rank holds of `tensor`, and the shape of the whole.

    Args:
        tensor: a plain tensor (held whole) or a DTensor with Shard and Replicate placements. Shards may be uneven;
            where a dimension is smaller than the ranks that share it, the last ranks hold an empty box.
    """
    shape = tuple(tensor.shape)
    if not _is_dtensor(tensor):
        return Box.whole(shape), shape
    box = _dtensor_box(tensor)  # type: ignore[arg-type]
    held = tuple(local_tensor(tensor).shape)
    assert box.shape == held, f"computed shard {box.shape}, but this rank holds {held}"
    return box, shape


def shard_rows(tensor: torch.Tensor) -> tuple[int, list[int]]:
    """Returns which shard of `tensor` this rank holds, and how many rows each shard has.

    Args:
        tensor: plain (one shard), or a DTensor cut along its first dimension over at most one dimension of its mesh.
    """
    rows = tensor.shape[0] if tensor.ndim else 1
    if not _is_dtensor(tensor):
        return 0, [rows]
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    cut = [dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate()]  # type: ignore[attr-defined]
    assert len(cut) <= 1, tensor.placements  # type: ignore[attr-defined]
    if not cut:
        return 0, [rows]
    count, coordinate = mesh.size(cut[0]), mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    part = -(-rows // count)
    return coordinate[cut[0]], [max(0, min(part, rows - index * part)) for index in range(count)]


def replica_rank_and_count(tensor: torch.Tensor, group: torch.distributed.ProcessGroup | None = None) -> tuple[int, int]:
    """Returns which copy of its local box this rank holds, and how many ranks hold one.

    Args:
        tensor: a DTensor is copied along the Replicate dimensions of its mesh (HSDP: dp_replicate); a plain tensor is
            held by every rank of `group`.
        group: default: all ranks. Without a process group there is one copy.
    """
    import torch.distributed as dist

    if not _is_dtensor(tensor):
        return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_available() and dist.is_initialized() else (0, 1)
    coordinate = tensor.device_mesh.get_coordinate()  # type: ignore[attr-defined]
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    copy, count = 0, 1
    for placement, index, size in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):  # type: ignore[attr-defined]
        if placement.is_replicate():
            copy, count = copy * size + index, count * size
    return copy, count


def _is_dtensor(tensor: torch.Tensor) -> bool:
    import torch.distributed as dist

    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _dtensor_box(tensor: DTensor) -> Box:
    """Returns the shard's place by DTensor's own rule: mesh dimensions left to right, each cut into ceil(n / ranks).

    The rule is spelled out because torch keeps its function for it private and has moved it between versions.
    """
    from torch.distributed.tensor import Replicate, Shard

    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the tensor's mesh"
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    for placement, index, ranks in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        # Exact types: a strided shard (tensor parallelism inside FSDP2) follows another order, a partial sum is no value.
        assert type(placement) in (Shard, Replicate), f"cannot address a tensor placed as {placement}"
        if type(placement) is Shard:
            dim = placement.dim
            part = -(-shape[dim] // ranks)
            start = min(index * part, shape[dim])
            offset[dim], shape[dim] = offset[dim] + start, min(part, shape[dim] - start)
    return Box(tuple(offset), tuple(shape))
