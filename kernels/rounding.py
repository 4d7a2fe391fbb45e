"""Rounding to narrow number formats inside of Triton kernels; imported only where there is Triton."""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Returns x in `dtype`; to bf16 by the nearest even, also in the interpreter, whose own conversion truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # Adding to the bits of a NaN could make an infinity of it.
        nearest = tl.where(x != x, 0x7FC0, nearest)
        rounded = nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded
