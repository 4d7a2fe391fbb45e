"""How a fragment is encoded, and what its fingerprint is made of: what kernels and references have in common.

A fragment is a flat tensor of n elements in blocks of `BLOCK`, the last one maybe short. Encoded it is a tensor of codes
(uint8) and, for int8 and int4, one float32 scale a block:

    format   codes of a block              decoded
    fp64     8 BLOCK bytes                 the value
    fp32     4 BLOCK bytes                 the value
    bf16     2 BLOCK bytes, nearest even   the value
    int8     BLOCK bytes, -127 ... 127     code x scale, scale = largest magnitude of the block / 127
    int4     BLOCK / 2 bytes, -7 ... 7     the same with 7; element 2i in the low half of byte i, each plus 8

The fingerprint sums the bits of outer parameters and momentum times odd numbers that depend on the place, modulo 2^32 in a block
and 2^64 in all: no single flipped bit leaves it unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
# Bytes of the codes of one block.
CODE_BYTES = {"fp64": 8 * BLOCK, "fp32": 4 * BLOCK, "bf16": 2 * BLOCK, "int8": BLOCK, "int4": BLOCK // 2}
LARGEST = {"int8": 127.0, "int4": 7.0}
FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# The inverse of a smaller scale overflows.
SMALLEST_SCALE = 1.2e-38
# Odd, as signed numbers: of outer parameters and momentum within a block (32 bits), and of the block (64 bits).
MIX_OUTER, MIX_MOMENTUM, MIX_BLOCK = 0x9E3779B1 - 2**32, 0x517CC1B7, 0x9E3779B97F4A7C15 - 2**64


def num_blocks(n: int) -> int:
    """Returns the number of blocks of a fragment of n elements."""
    return -(-n // BLOCK)


def has_scales(format: str) -> bool:
    """Returns whether a format has a scale a block."""
    return format in LARGEST


def check_codes(format: str, blocks: int, codes: Tensor, scales: Tensor) -> None:
    """Asserts that codes and scales are those of so many blocks."""
    assert codes.numel() == blocks * CODE_BYTES[format], (format, blocks, codes.shape)
    assert scales.numel() == (blocks if has_scales(format) else 0), (format, blocks, scales.shape)
