"""How two checkpoints differ, tensor by tensor, however each of them is cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from factory_train.checkpoint.format import TensorRecord
from factory_train.checkpoint.reader import CheckpointReader


@dataclass(frozen=True)
class Difference:
    """One tensor of two checkpoints.

    Args:
        tensor: "section name".
        equal: whether every bit is the same.
        what: how they differ, for people; empty where they are equal.
    """

    tensor: str
    equal: bool
    what: str = ""

    def __str__(self) -> str:
        return f"{self.tensor}  {self.what or 'equal'}"


def compare(a: CheckpointReader, b: CheckpointReader) -> Iterator[Difference]:
    """Yields every tensor of either; bytes are read only where checksums do not settle it. Verify both first."""
    of_a, of_b = a.manifest.contents.tensors, b.manifest.contents.tensors
    keys = {(section, name) for tensors in (of_a, of_b) for section, records in tensors.items() for name in records}
    for section, name in sorted(keys):
        tensor = f"{section} {name}"
        first, second = of_a.get(section, {}).get(name), of_b.get(section, {}).get(name)
        if first is None or second is None:
            yield Difference(tensor, False, f"only in {'b' if first is None else 'a'}")
        elif (first.dtype, first.shape) != (second.dtype, second.shape):
            yield Difference(tensor, False, f"{first.dtype} {list(first.shape)} -> {second.dtype} {list(second.shape)}")
        elif _checksums(first) == _checksums(second):
            yield Difference(tensor, True)
        else:
            yield _values(tensor, a.read(section, name), b.read(section, name))


def _checksums(record: TensorRecord) -> list[tuple[tuple[int, ...], tuple[int, ...], str]]:
    return [(chunk.offset, chunk.shape, chunk.xxh3) for chunk in record.chunks]


def _values(tensor: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    if torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)):
        return Difference(tensor, True)
    wide_a, wide_b = a.double(), b.double()
    gap = (wide_a - wide_b).abs()
    scale = wide_a.pow(2).mean().sqrt().item()
    share = (gap != 0).double().mean().item()
    relative = f", {gap.max().item() / scale:.3g} of its root mean square" if scale else ""
    return Difference(tensor, False, f"{share:.1%} of elements differ, by at most {gap.max().item():.3g}{relative}")
