"""Initial weights that do not depend on how the model is sharded.

Every parameter is cut into fixed blocks of rows, and each block has a random generator of its own, seeded by
(seed, name, block). A rank draws the blocks its shard touches and no others, so one process, DDP and any FSDP2
mesh start from the same numbers, and a large model costs each rank its own share only.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import nn

from factory_train.distributed.box import local_box, local_tensor
from factory_train.kernels.split_float import split_float32

# Numbers drawn from one generator: large enough to be fast, small enough that a shard draws little it does not keep.
BLOCK_NUMEL = 1 << 20


# A bfloat16 parameter whose master is float32 carries what it lacks of it (`kernels/split_float.py`) under this name, from
# initialization until an optimizer takes it over.
_REMAINDER = "float32_remainder"


def take_remainder(parameter: torch.Tensor) -> torch.Tensor:
    """Returns the int16 remainder of the local shard of a bfloat16 parameter, and forgets it; zeros where it has none."""
    remainder: torch.Tensor | None = parameter.__dict__.pop(_REMAINDER, None)
    return torch.zeros_like(local_tensor(parameter.detach()), dtype=torch.int16) if remainder is None else remainder


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int, initial_std: Callable[[str], float | None]) -> None:
    """Fills every parameter in place: normal with the given standard deviation, or ones where it is None.

    Of bfloat16 parameters the remainder of the float32 number is kept too (`take_remainder`).

    Args:
        model: parameters may be plain tensors or DTensors, on any device but meta.
        seed: the run's seed.
        initial_std: standard deviation by parameter name.
    """
    for name, parameter in model.named_parameters():
        std = initial_std(name)
        local = local_tensor(parameter)
        if std is None:
            local.fill_(1.0)
        elif local.numel():
            box, global_shape = local_box(parameter)
            rows = normal_rows(seed, name, global_shape, box.offset[0], box.offset[0] + box.shape[0])
            columns = tuple(slice(start, start + size) for start, size in zip(box.offset[1:], box.shape[1:], strict=True))
            values = rows[(slice(None), *columns)] * std
            if local.dtype == torch.bfloat16:
                values, remainder = split_float32(values)
                setattr(parameter, _REMAINDER, remainder.to(local.device))
            local.copy_(values)


def normal_rows(seed: int, name: str, shape: tuple[int, ...], start: int, stop: int) -> torch.Tensor:
    """Returns rows [start, stop) of the standard normal tensor that (seed, name) stands for, in float32 on the CPU.

    Args:
        shape: global shape, at least one-dimensional.
    """
    row_numel = math.prod(shape[1:])
    block_rows = max(1, BLOCK_NUMEL // max(1, row_numel))
    blocks = []
    for block in range(start // block_rows, -(-stop // block_rows)):
        first = block * block_rows
        digest = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        rows = torch.randn((min(block_rows, shape[0] - first), *shape[1:]), generator=generator)
        blocks.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(blocks)
