"""Optimizer states in 8 bits: blocks of 256 numbers, each with its largest magnitude in float32.

A code stands for a root: of the first moment, with its sign, and of the root of the second moment, which is what the update
divides by. A number of a hundredth of its block's largest is then still a tenth of the codes from zero, so that elements of
small gradients beside large ones keep their pace. A second moment is never rounded to zero, for an update divides by it.

Coding what was decoded gives the same codes again, so moving a checkpoint through float32 costs no bit as long as
the blocks begin at the same elements.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

BLOCK = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def decode_signed_rows(codes, scale):
        """First moments of codes [rows, 256] and scales [rows, 1]."""
        z = codes.to(tl.float32) * (1.0 / 127.0)
        return z * tl.abs(z) * scale

    @triton.jit
    def encode_signed_rows(values):
        """Returns int8 codes and scales [rows]."""
        scale = tl.max(tl.abs(values), axis=1)
        inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
        # The inverse of a denormal is infinite; such moments do nothing and become zeros.
        inverse = tl.where(inverse < float("inf"), inverse, 0.0)
        size = tl.minimum(tl.floor(tl.sqrt_rn(tl.abs(values) * inverse[:, None]) * 127.0 + 0.5), 127.0)
        return tl.where(values < 0.0, -size, size).to(tl.int8), scale

    @triton.jit
    def decode_root_rows(codes, scale):
        """Second moments of codes [rows, 256] and scales [rows, 1]."""
        z = codes.to(tl.float32) * (1.0 / 255.0)
        root = z * z * scale
        return root * root

    @triton.jit
    def encode_root_rows(roots):
        """Returns uint8 codes and scales [rows] of second moments whose square roots are given."""
        scale = tl.max(roots, axis=1)
        inverse = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 0.0)
        inverse = tl.where(inverse < float("inf"), inverse, 0.0)
        codes = tl.floor(tl.sqrt_rn(roots * inverse[:, None]) * 255.0 + 0.5)
        lowest = tl.where(roots > 0.0, 1.0, 0.0)
        codes = tl.minimum(tl.maximum(codes, lowest), 255.0)
        return codes.to(tl.int32).to(tl.uint8), scale


def num_blocks(numel: int) -> int:
    """Returns how many scales a tensor of `numel` elements has."""
    return -(-numel // BLOCK)


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns first moments in float32, (rows, 256), of int8 codes (rows, 256) and scales (rows,)."""
    z = codes.float() * (1.0 / 127.0)
    return z * z.abs() * scale.unsqueeze(1)


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Returns int8 codes (rows, 256) and float32 scales (rows,) of first moments (rows, 256)."""
    scale = values.abs().amax(dim=1)
    size = (exact_sqrt(values.abs() * _inverse(scale)) * 127.0 + 0.5).floor_().clamp_(max=127.0)
    return torch.copysign(size, values).to(torch.int8), scale


def decode_root(codes: Tensor, scale: Tensor) -> Tensor:
    """Returns second moments in float32, (rows, 256), of uint8 codes (rows, 256) and scales (rows,)."""
    z = codes.float() * (1.0 / 255.0)
    root = z * z * scale.unsqueeze(1)
    return root * root


def encode_root(roots: Tensor) -> tuple[Tensor, Tensor]:
    """Returns uint8 codes (rows, 256) and float32 scales (rows,) of second moments whose square roots are given."""
    scale = roots.amax(dim=1)
    codes = (exact_sqrt(roots * _inverse(scale)) * 255.0 + 0.5).floor_()
    return codes.masked_fill_((codes < 1) & (roots > 0), 1.0).clamp_(max=255.0).to(torch.uint8), scale


def exact_sqrt(values: Tensor) -> Tensor:
    """Returns square roots rounded as IEEE has it; torch's own in float32 is off by a bit for some numbers on CPUs."""
    return values.double().sqrt_().float()


def _inverse(scale: Tensor) -> Tensor:
    """Returns 1 / scale in a column, zero where it is zero or so small that its inverse is infinite."""
    inverse = 1.0 / scale
    return inverse.masked_fill_(inverse == float("inf"), 0.0).unsqueeze(1)


def in_blocks(values: Tensor) -> Tensor:
    """Returns a tensor as (rows, 256): a view where its length is a multiple of that, else a copy with zeros at the end."""
    flat = values.reshape(-1)
    missing = -flat.numel() % BLOCK
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
