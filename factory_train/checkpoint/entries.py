"""What a rank holds of each tensor, and which of that it writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from factory_train.checkpoint.format import DTYPES, spread
from factory_train.checkpoint.part import Empty, Part, Piece, writer_name
from factory_train.distributed.box import Box, local_box, local_tensor, replica_rank_and_count, shard_rows
from factory_train.distributed.encoded import EncodedTensor, Stored
from factory_train.kernels.block_codes import num_blocks

# A chunk is what is verified at once and what a reader that needs a corner of a tensor has to read.
MAX_CHUNK_BYTES = 64 << 20
# The optimizer's own encoding beside the canonical one (docs/checkpoint-format.md).
NATIVE = "native/"


@dataclass(frozen=True)
class TensorEntry:
    """What this rank holds of one tensor.

    Args:
        name: parameter name, the same under every strategy.
        section: "weights", "optimizer/exp_avg", ...
        tensor: the local part, on any device, of shape `box.shape`; loading fills it in place. One in another encoding is
            decoded when it is saved and encoded when it is loaded.
        box: which part of the whole it is; it may be empty.
        global_shape: shape of the whole tensor.
        replica_rank, replica_count: which copy of this box the rank holds, out of how many. Ranks that share copies
            must pass the same entries, for each decides alone which of them it writes.
    """

    name: str
    section: str
    tensor: Stored
    box: Box
    global_shape: tuple[int, ...]
    replica_rank: int = 0
    replica_count: int = 1

    @staticmethod
    def of(section: str, name: str, tensor: torch.Tensor) -> TensorEntry:
        """Describes a plain tensor (held by all ranks) or a DTensor."""
        box, global_shape = local_box(tensor)
        return TensorEntry(name, section, local_tensor(tensor.detach()), box, global_shape, *replica_rank_and_count(tensor))

    @property
    def key(self) -> str:
        """Orders entries alike on all ranks."""
        return f"{self.section}/{self.name}"

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    @property
    def num_bytes(self) -> int:
        return self.box.numel * self.tensor.element_size()


def training_entries(
    parameters: Mapping[str, torch.Tensor],
    optimizer_state: Mapping[str, Mapping[str, Stored]],
    *,
    replica_rank: int,
    replica_count: int,
    masters: Mapping[str, Stored] | None = None,
) -> list[TensorEntry]:
    """Describes what a rank holds of a model in training: sections "weights", "optimizer/<key>", and "native/..." of 8-bit states.

    Args:
        parameters: plain or DTensors, by name.
        optimizer_state: {key: {parameter's name: tensor shaped like its local shard}}.
        replica_rank, replica_count: which copy of its shards this rank holds, out of how many.
        masters: float32 weights of parameters that are kept in another form.
    """
    sections: dict[str, dict[str, Stored]] = {"weights": {name: local_tensor(value.detach()) for name, value in parameters.items()}}
    sections["weights"] |= masters or {}
    sections |= {f"optimizer/{key}": dict(tensors) for key, tensors in optimizer_state.items()}
    boxes = {name: local_box(parameter) for name, parameter in parameters.items()}
    entries = [
        TensorEntry(name, section, tensor, *boxes[name], replica_rank, replica_count)
        for section, tensors in sections.items()
        for name, tensor in tensors.items()
    ]
    return [*entries, *(native for entry in entries for native in _native_entries(entry, parameters[entry.name]))]


def _native_entries(entry: TensorEntry, parameter: torch.Tensor) -> Iterator[TensorEntry]:
    """Describes what an encoded tensor really is.

    Blocks of 256 begin anew in each shard, so the number of shards is part of the section's name: what another number of them
    saved is never mistaken for one's own.
    """
    if not isinstance(entry.tensor, EncodedTensor) or not entry.tensor.natives:
        return
    rank, rows = shard_rows(parameter)
    row_numel = Box.whole(entry.global_shape[1:]).numel
    blocks = [num_blocks(count * row_numel) for count in rows]
    for kind, tensor in entry.tensor.natives.items():
        section = f"{NATIVE}{len(rows)}-shards/{entry.section.removeprefix('optimizer/')}.{kind}"
        if kind == "codes":
            yield replace(entry, section=section, tensor=tensor)
        else:
            box = Box((sum(blocks[:rank]),), (blocks[rank],))
            yield replace(entry, section=section, tensor=tensor, box=box, global_shape=(sum(blocks),))


def choose_writes(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """Returns the entries this rank writes: each replicated box falls to one of its copies, spread by bytes.

    Ordered for the file: wider types first, which keeps each tensor aligned.
    """
    chosen = []
    for count in sorted({entry.replica_count for entry in entries}):
        shared = sorted((entry for entry in entries if entry.replica_count == count and entry.box.numel), key=lambda entry: entry.key)
        writers = spread([entry.num_bytes for entry in shared], count)
        chosen += [entry for entry, writer in zip(shared, writers, strict=True) if writer == entry.replica_rank]
    return sorted(chosen, key=lambda entry: (-entry.tensor.element_size(), entry.key))


@dataclass(frozen=True)
class Writes:
    """The part of a checkpoint that this rank writes, and the tensors its bytes come from.

    Args:
        part: pieces whose `start` counts bytes over `sources`, one after another.
        sources: (first byte, local tensor), in order.
    """

    part: Part
    sources: tuple[tuple[int, Stored], ...]


def plan_writes(entries: Sequence[TensorEntry], step: int, rank: int, state: Mapping[str, Any]) -> Writes:
    """Decides what this rank writes; `state` is written by rank 0."""
    pieces: list[Piece] = []
    sources: list[tuple[int, Stored]] = []
    start = 0
    for entry in choose_writes(entries):
        assert entry.dtype in DTYPES, f"{entry.key}: {entry.dtype} is not in the format"
        assert tuple(entry.tensor.shape) == entry.box.shape, f"{entry.key}: {tuple(entry.tensor.shape)} is not {entry.box}"
        sources.append((start, entry.tensor))
        pieces += _pieces(entry, start)
        start += entry.num_bytes
    empty = tuple(Empty(e.section, e.name, e.dtype, e.global_shape) for e in entries if not Box.whole(e.global_shape).numel)
    return Writes(Part(step, writer_name(rank), tuple(pieces), empty, state if rank == 0 else None), tuple(sources))


def _pieces(entry: TensorEntry, start: int) -> Iterator[Piece]:
    """Cuts a box along its first dimension: rows are contiguous, so a piece is one range of bytes."""
    offset, shape = entry.box.offset, entry.box.shape
    if not shape:
        yield Piece(entry.section, entry.name, entry.dtype, entry.global_shape, offset, shape, start)
        return
    row_bytes = entry.num_bytes // shape[0]
    rows = max(1, MAX_CHUNK_BYTES // row_bytes)
    for first in range(0, shape[0], rows):
        count = min(rows, shape[0] - first)
        yield Piece(
            entry.section,
            entry.name,
            entry.dtype,
            entry.global_shape,
            (offset[0] + first, *offset[1:]),
            (count, *shape[1:]),
            start + first * row_bytes,
        )
