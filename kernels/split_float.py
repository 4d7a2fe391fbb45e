"""A float32 as a bfloat16 and what is left of it: 16 bits each, and nothing lost.

The upper half is rounded half up, not half to even: what is left is then at most half a step below and less than half a
step above, which is just what an int16 holds. With half to even it would be a whole half step on both sides, and a tie
would come back one step off. It differs from a plain conversion to bfloat16 at exact ties alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split_float32(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the bfloat16 half and the int16 remainder, in the shape of `values`; `join_float32` undoes it bit for bit.

    Args:
        values: float32. Beyond the range of bfloat16 (3.39e38) the upper half is infinite; joined again it is the number.
    """
    bits = values.contiguous().view(torch.int32)
    # (bits + 0x8000) >> 16, without the addition that would pass the sign bit for the largest floats.
    high = ((bits >> 15) + 1) >> 1
    remainder = (bits - (high << 16)).to(torch.int16)
    return high.to(torch.int16).view(torch.bfloat16), remainder


def join_float32(high: Tensor, remainder: Tensor) -> Tensor:
    """Returns the float32 that `split_float32` took apart."""
    return ((high.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)
