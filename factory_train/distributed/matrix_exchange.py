"""Whole matrices out of shards and back: each matrix goes to one rank, which works on it for all.

Data-parallel ranks form a grid of `replicas` x `shards`. A rank of a replica holds some rows of every matrix (all of
them where there is one shard). The owner of a matrix gets its rows from the shards of its own replica and sends the
result back the same way; the replicas then tell each other their results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from factory_train.distributed.box import local_tensor

# Most elements that are worked on at once, so that a single card needs no second copy of the whole model.
_BANK_NUMEL = 1 << 28


@dataclass(frozen=True)
class Grid:
    """This rank's place among the ranks that share the work.

    Args:
        replicas, shards: size of the grid.
        replica, shard: this rank's place in it.
        replica_group: ranks with the same shard; shard_group: ranks of the same replica; None where there is one rank.
    """

    replicas: int = 1
    shards: int = 1
    replica: int = 0
    shard: int = 0
    replica_group: dist.ProcessGroup | None = None
    shard_group: dist.ProcessGroup | None = None

    @staticmethod
    def of(parameter: Tensor) -> Grid:
        """Returns the grid of a DTensor sharded by rows (FSDP2, HSDP), or of a plain tensor that every rank holds."""
        if not isinstance(parameter, DTensor):
            if not dist.is_initialized():
                return Grid()
            return Grid(dist.get_world_size(), 1, dist.get_rank(), 0, dist.group.WORLD, None)
        mesh = parameter.device_mesh
        *outer, inner = parameter.placements
        assert inner.is_shard(0), parameter.placements
        assert all(placement.is_replicate() for placement in outer), parameter.placements
        coordinate = mesh.get_coordinate()
        assert coordinate is not None, "this rank is not in the mesh"
        if mesh.ndim == 1:
            return Grid(1, mesh.size(0), 0, coordinate[0], None, mesh.get_group(0))
        return Grid(mesh.size(0), mesh.size(1), coordinate[0], coordinate[1], mesh.get_group(0), mesh.get_group(1))


@dataclass(frozen=True)
class _Matrix:
    name: str
    rows: int
    columns: int
    owner: int

    def rows_of(self, shard: int, shards: int) -> int:
        """FSDP2's rule: every shard holds ceil(rows / shards) rows, the last ones what is left."""
        part = -(-self.rows // shards)
        return max(0, min(part, self.rows - shard * part))


class MatrixExchange:
    """Buffers for one tensor shaped like the local shard of each matrix, and what happens to whole matrices in between.

    Args:
        parameters: the matrices by name; the same on all ranks, all placed alike.
        dtype: of the buffers, which is also what is sent.
        device: of the buffers.
    """

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.grid = grid = Grid.of(next(iter(parameters.values())))
        owners = assign_owners({name: (p.shape[0], p.shape[1]) for name, p in parameters.items()}, grid.replicas * grid.shards)
        matrices = [_Matrix(name, p.shape[0], p.shape[1], owners[name]) for name, p in parameters.items()]
        # The order of sending: by owner. Equal shapes lie side by side.
        matrices.sort(key=lambda m: (m.owner, m.rows, m.columns, m.name))
        slabs = [[m for m in matrices if m.owner // grid.shards == replica] for replica in range(grid.replicas)]
        longest = max(sum(self._local_numel(m) for m in slab) for slab in slabs)
        self._buffer = torch.zeros(grid.replicas, longest, dtype=dtype, device=device)
        self.shards: dict[str, Tensor] = {}
        for slab, row in zip(slabs, self._buffer, strict=True):
            start = 0
            for matrix in slab:
                shape = tuple(local_tensor(parameters[matrix.name].detach()).shape)
                assert shape == (matrix.rows_of(grid.shard, grid.shards), matrix.columns), f"{matrix.name} is not sharded by rows"
                numel = self._local_numel(matrix)
                self.shards[matrix.name] = row[start : start + numel].view(shape)
                start += numel
        slab = slabs[grid.replica]
        self._owned = [m for m in slab if m.owner == grid.replica * grid.shards + grid.shard]
        self._sent = [sum(self._local_numel(m) for m in slab if m.owner % grid.shards == shard) for shard in range(grid.shards)]
        self._received = [sum(m.rows_of(shard, grid.shards) * m.columns for m in self._owned) for shard in range(grid.shards)]

    def _local_numel(self, matrix: _Matrix) -> int:
        return matrix.rows_of(self.grid.shard, self.grid.shards) * matrix.columns

    def transform(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replaces each matrix by `function` of it; all ranks end with shards of the very same results.

        Args:
            function: maps a batch of matrices of equal shape to one like it.
        """
        grid = self.grid
        own = self._buffer[grid.replica][: sum(self._sent)]
        if grid.shards == 1:
            self._work(function, {matrix.name: [self.shards[matrix.name]] for matrix in self._owned})
        else:
            received = own.new_empty(sum(self._received))
            dist.all_to_all_single(received, own, self._received, self._sent, group=grid.shard_group)
            self._work(function, self._pieces(received))
            dist.all_to_all_single(own, received, self._sent, self._received, group=grid.shard_group)
        if grid.replicas > 1:
            dist.all_gather_into_tensor(self._buffer.view(-1), self._buffer[grid.replica].clone(), group=grid.replica_group)

    def _pieces(self, received: Tensor) -> dict[str, list[Tensor]]:
        """Returns the rows of each owned matrix, in order, as views of what has come."""
        pieces: dict[str, list[Tensor]] = {matrix.name: [] for matrix in self._owned}
        start = 0
        for shard in range(self.grid.shards):
            for matrix in self._owned:
                rows = matrix.rows_of(shard, self.grid.shards)
                pieces[matrix.name].append(received[start : start + rows * matrix.columns].view(rows, matrix.columns))
                start += rows * matrix.columns
        return pieces

    def _work(self, function: Callable[[Tensor], Tensor], pieces: Mapping[str, list[Tensor]]) -> None:
        for bank in _banks(self._owned):
            whole = torch.stack([torch.cat(pieces[matrix.name]) for matrix in bank])
            for matrix, result in zip(bank, function(whole), strict=True):
                parts = pieces[matrix.name]
                for part, rows in zip(parts, result.split([len(part) for part in parts]), strict=True):
                    part.copy_(rows)


def assign_owners(shapes: Mapping[str, tuple[int, int]], num_ranks: int) -> dict[str, int]:
    """Gives each matrix to a rank: the costly ones first, each to the rank with the least to do; alike on all ranks.

    Args:
        shapes: of the matrices, by name. Cost is that of the matmuls: elements times the smaller side.
    """
    loads = [0] * num_ranks
    owners: dict[str, int] = {}
    for name in sorted(shapes, key=lambda name: (-_cost(shapes[name]), name)):
        owners[name] = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[name]] += _cost(shapes[name])
    return owners


def _cost(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1] * min(shape)


def _banks(matrices: Iterable[_Matrix]) -> list[list[_Matrix]]:
    """Groups matrices of equal shape, `_BANK_NUMEL` elements at most (one matrix at least) in a group."""
    banks: list[list[_Matrix]] = []
    for matrix in matrices:
        last = banks[-1] if banks else None
        alike = last is not None and (last[0].rows, last[0].columns) == (matrix.rows, matrix.columns)
        if last is not None and alike and (len(last) + 1) * matrix.rows * matrix.columns <= _BANK_NUMEL:
            last.append(matrix)
        else:
            banks.append([matrix])
    return banks
