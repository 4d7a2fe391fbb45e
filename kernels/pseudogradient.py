"""The passes of a DiLoCo synchronisation: encode the pseudo-gradient, reduce encoded shards, take the outer step, take a fingerprint.

Codes and fingerprints are described in `kernels.pseudogradient_format`. Floors in bytes an element, float32 state and error, int8,
M islands: `encode` 17 (read outer, inner, error; write code, error; 12 without error feedback plus the code), `reduce` 1 + 1 / M,
`outer_update` 25 (read code, outer, momentum, inner; write the three), `fingerprint_parts` 8 (read outer, momentum).

All islands decode the same bytes with the same arithmetic, fused multiply-adds switched off, so that what they make of them is
bit-identical.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from factory_train.kernels import pseudogradient_reference as reference
from factory_train.kernels.pseudogradient_format import (
    BLOCK,
    CODE_BYTES,
    MIX_BLOCK,
    MIX_MOMENTUM,
    MIX_OUTER,
    check_codes,
    has_scales,
    num_blocks,
)

__all__ = [
    "BLOCK", "CODE_BYTES", "HAS_TRITON", "ROWS", "encode", "fingerprint_parts", "has_scales", "launch_encode", "launch_fingerprint",
    "launch_outer_update", "launch_reduce", "num_blocks", "outer_update", "reduce",
]  # fmt: skip

# Blocks of one Triton program.
ROWS = 8

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    from factory_train.kernels.rounding import round_to

    @triton.jit
    def load_decoded(codes, scales, block, num_blocks, FORMAT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
        """Returns ROWS blocks, from number `block` on, decoded; zeros beyond the last."""
        rows = block + tl.arange(0, ROWS)[:, None]
        at = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rows < num_blocks) & (at >= 0)
        if FORMAT == "fp32":
            x = tl.load(codes.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
        elif FORMAT == "bf16":
            x = tl.load(codes.to(tl.pointer_type(tl.bfloat16)) + at, mask=inside, other=0.0).to(tl.float32)
        else:
            scale = tl.load(scales + rows, mask=rows < num_blocks, other=0.0)
            if FORMAT == "int8":
                x = tl.load(codes.to(tl.pointer_type(tl.int8)) + at, mask=inside, other=0).to(tl.float32) * scale
            else:
                pair = tl.load(codes + at // 2, mask=inside, other=0x88).to(tl.int32)
                x = (((pair >> ((at % 2) * 4).to(tl.int32)) & 0xF) - 8).to(tl.float32) * scale
        return x

    @triton.jit
    def store_encoded(x, codes, scales, block, num_blocks, FORMAT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
        """Encodes ROWS blocks, writes them, and returns what they decode to."""
        rows = block + tl.arange(0, ROWS)[:, None]
        at = rows * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = (rows < num_blocks) & (at >= 0)
        if FORMAT == "fp32":
            tl.store(codes.to(tl.pointer_type(tl.float32)) + at, x, mask=inside)
            decoded = x
        elif FORMAT == "bf16":
            rounded = round_to(x, tl.bfloat16)
            tl.store(codes.to(tl.pointer_type(tl.bfloat16)) + at, rounded, mask=inside)
            decoded = rounded.to(tl.float32)
        else:
            LARGEST: tl.constexpr = 127.0 if FORMAT == "int8" else 7.0
            scale = tl.max(tl.abs(x), axis=1, keep_dims=True) / LARGEST
            # The inverse of a smaller scale overflows.
            inverse = tl.where(scale > 1.2e-38, 1.0 / tl.maximum(scale, 1.2e-38), 0.0)
            code = tl.minimum(tl.maximum(tl.floor(x * inverse + 0.5), -LARGEST), LARGEST)
            decoded = code * scale
            tl.store(scales + rows, scale, mask=rows < num_blocks)
            if FORMAT == "int8":
                tl.store(codes.to(tl.pointer_type(tl.int8)) + at, code.to(tl.int8), mask=inside)
            else:
                low, high = tl.split(tl.reshape(code.to(tl.int32) + 8, (ROWS, BLOCK // 2, 2)))
                half = rows * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
                tl.store(codes + half, (low | (high << 4)).to(tl.uint8), mask=(rows < num_blocks) & (half >= 0))
        return decoded

    @triton.jit
    def encode_pass(
        outer, inner, error, codes, scales, new_error, squares, n, num_blocks, HAS_ERROR: tl.constexpr, FORMAT: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Encodes outer - inner + error and keeps what the code leaves out."""
        # 64 bits: offsets pass 2^31.
        block = tl.program_id(0).to(tl.int64) * ROWS
        rows = block + tl.arange(0, ROWS)
        at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = at < n
        x = tl.load(outer + at, mask=inside, other=0.0) - tl.load(inner + at, mask=inside, other=0.0)
        if HAS_ERROR:
            x += tl.load(error + at, mask=inside, other=0.0)
        tl.store(squares + rows, tl.sum(x * x, axis=1), mask=rows < num_blocks)
        decoded = store_encoded(x, codes, scales, block, num_blocks, FORMAT, BLOCK, ROWS)
        if HAS_ERROR:
            tl.store(new_error + at, x - decoded, mask=inside)

    @triton.jit
    def reduce_pass(
        codes, scales, weights, out_codes, out_scales, num_blocks, code_stride, MEMBERS: tl.constexpr, FORMAT: tl.constexpr,
        BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Encodes the weighted sum of what all members sent, added up in their order."""
        block = tl.program_id(0).to(tl.int64) * ROWS
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for member in tl.static_range(MEMBERS):
            weight = tl.load(weights + member)
            x = load_decoded(codes + member * code_stride, scales + member * num_blocks, block, num_blocks, FORMAT, BLOCK, ROWS)
            # What is left out may not even be finite.
            total += tl.where(weight != 0, weight * x, 0.0)
        store_encoded(total, out_codes, out_scales, block, num_blocks, FORMAT, BLOCK, ROWS)

    @triton.jit
    def parts_of(w, v, inside, number, mix_block, MIX_OUTER: tl.constexpr, MIX_MOMENTUM: tl.constexpr, BLOCK: tl.constexpr):
        """Returns the fingerprint's parts of ROWS blocks, `number` being the place of each in the fragment."""
        odd = 2 * tl.arange(0, BLOCK)[None, :] + 1
        bits = w.to(tl.int32, bitcast=True) * (odd * MIX_OUTER) + v.to(tl.int32, bitcast=True) * (odd * MIX_MOMENTUM)
        return tl.sum(tl.where(inside, bits, 0), axis=1).to(tl.int32).to(tl.int64) * ((2 * number + 1) * mix_block)

    @triton.jit
    def update_pass(
        codes, scales, outer, momentum, inner, prints, n, num_blocks, first, lr, mu, keep, mix_block,
        MIX_OUTER: tl.constexpr, MIX_MOMENTUM: tl.constexpr, HAS_PRINTS: tl.constexpr,
        FORMAT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Takes the outer Nesterov step, mixes it into the inner parameters, and sums the bits of the new state."""
        block = tl.program_id(0).to(tl.int64) * ROWS
        rows = block + tl.arange(0, ROWS)
        at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = at < n
        g = load_decoded(codes, scales, block, num_blocks, FORMAT, BLOCK, ROWS)
        v = mu * tl.load(momentum + at, mask=inside, other=0.0) + g
        w = tl.load(outer + at, mask=inside, other=0.0) - lr * (g + mu * v)
        tl.store(momentum + at, v, mask=inside)
        tl.store(outer + at, w, mask=inside)
        mixed = w
        if keep != 0:
            mixed = keep * tl.load(inner + at, mask=inside, other=0.0) + (1.0 - keep) * w
        tl.store(inner + at, mixed, mask=inside)
        if HAS_PRINTS:
            parts = parts_of(w, v, inside, first + rows, mix_block, MIX_OUTER, MIX_MOMENTUM, BLOCK)
            tl.store(prints + rows, parts, mask=rows < num_blocks)

    @triton.jit
    def fingerprint_pass(
        outer, momentum, prints, n, num_blocks, mix_block,
        MIX_OUTER: tl.constexpr, MIX_MOMENTUM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Sums the bits of the state as it is."""
        block = tl.program_id(0).to(tl.int64) * ROWS
        rows = block + tl.arange(0, ROWS)
        at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        inside = at < n
        w, v = tl.load(outer + at, mask=inside, other=0.0), tl.load(momentum + at, mask=inside, other=0.0)
        parts = parts_of(w, v, inside, rows, mix_block, MIX_OUTER, MIX_MOMENTUM, BLOCK)
        tl.store(prints + rows, parts, mask=rows < num_blocks)


def _on_card(tensor: Tensor, format: str) -> bool:
    return HAS_TRITON and tensor.is_cuda and format != "fp64"


@torch.library.custom_op("factory_train::pseudogradient_encode", mutates_args=("codes", "scales", "new_error", "squares"))
def encode(
    outer: Tensor, inner: Tensor, error: Tensor, codes: Tensor, scales: Tensor, new_error: Tensor, squares: Tensor, format: str
) -> None:
    """Encodes outer - inner + error, and writes what the code leaves out into `new_error`.

    Args:
        outer, inner: parameters of a fragment, flat, of one floating type (float32, or float64).
        error: left out by the code before; empty without error feedback, and `new_error` too then.
        codes: uint8, `CODE_BYTES[format]` a block.
        scales: float32, one a block; empty for formats without.
        squares: sum of squares of each block; not finite where an element is not.
        format: a key of `CODE_BYTES`.
    """
    if _on_card(outer, format) and outer.dtype == torch.float32:
        launch_encode(outer, inner, error, codes, scales, new_error, squares, format)
    else:
        reference.encode(outer, inner, error, codes, scales, new_error, squares, format)


def launch_encode(
    outer: Tensor, inner: Tensor, error: Tensor, codes: Tensor, scales: Tensor, new_error: Tensor, squares: Tensor, format: str
) -> None:
    """Launches the Triton kernel; arguments as of `encode`, all contiguous float32."""
    n, blocks = outer.numel(), num_blocks(outer.numel())
    check_codes(format, blocks, codes, scales)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (outer, inner, error, new_error))
    if n:
        encode_pass[(triton.cdiv(blocks, ROWS),)](
            outer, inner, error, codes, scales, new_error, squares, n, blocks, bool(error.numel()), format, BLOCK, ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@torch.library.custom_op("factory_train::pseudogradient_reduce", mutates_args=("out_codes", "out_scales"))
def reduce(codes: Tensor, scales: Tensor, weights: Tensor, out_codes: Tensor, out_scales: Tensor, format: str) -> None:
    """Encodes the weighted sum of what M islands sent for the same blocks.

    Args:
        codes: (M, bytes), uint8.
        scales: (M, blocks), float32; (M, 0) for formats without.
        weights: (M,), float32 (fp64: float64); what weighs 0 is not looked at.
        out_codes, out_scales: the encoded sum.
        format: a key of `CODE_BYTES`.
    """
    if _on_card(codes, format):
        launch_reduce(codes, scales, weights, out_codes, out_scales, format)
    else:
        reference.reduce(codes, scales, weights, out_codes, out_scales, format)


def launch_reduce(codes: Tensor, scales: Tensor, weights: Tensor, out_codes: Tensor, out_scales: Tensor, format: str) -> None:
    """Launches the Triton kernel; arguments as of `reduce`, all contiguous."""
    blocks = out_codes.numel() // CODE_BYTES[format]
    check_codes(format, blocks, out_codes, out_scales)
    assert all(tensor.is_contiguous() for tensor in (codes, scales, weights, out_codes, out_scales))
    assert weights.dtype == torch.float32
    if blocks:
        reduce_pass[(triton.cdiv(blocks, ROWS),)](
            codes, scales, weights, out_codes, out_scales, blocks, codes.shape[1], len(codes), format, BLOCK, ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@torch.library.custom_op("factory_train::pseudogradient_outer_update", mutates_args=("outer", "momentum", "inner", "prints"))
def outer_update(
    codes: Tensor, scales: Tensor, outer: Tensor, momentum: Tensor, inner: Tensor, prints: Tensor,
    lr: float, mu: float, keep: float, format: str, first: int = 0,
) -> None:  # fmt: skip
    """Decodes the averaged pseudo-gradient g, takes the outer step and mixes it into the inner parameters, all in place.

        v = mu v + g;  outer = outer - lr (g + mu v);  inner = keep inner + (1 - keep) outer

    SGD with Nesterov momentum as in `torch.optim.SGD` (DiLoCo, arXiv 2311.08105); mixing as in Streaming DiLoCo (arXiv
    2501.18512, algorithm 2), `keep` being its alpha.

    Args:
        codes, scales: encoded g.
        outer, momentum, inner: flat, of one floating type.
        prints: int64, one a block: parts of the fingerprint, which is their sum modulo 2^64; empty where it is not wanted.
        keep: 0 makes the inner parameters those of the outer ones whatever they were.
        format: a key of `CODE_BYTES`.
        first: number of the first block in the fragment, where these are a part of it: its place in the fingerprint.
    """
    if _on_card(outer, format) and outer.dtype == torch.float32:
        launch_outer_update(codes, scales, outer, momentum, inner, prints, lr, mu, keep, format, first)
    else:
        reference.outer_update(codes, scales, outer, momentum, inner, prints, lr, mu, keep, format, first)


@torch.library.custom_op("factory_train::pseudogradient_fingerprint", mutates_args=())
def fingerprint_parts(outer: Tensor, momentum: Tensor) -> Tensor:
    """Returns the parts of the fingerprint of a state, int64, one a block; their sum modulo 2^64 is the fingerprint.

    Args:
        outer, momentum: flat, of one floating type.
    """
    take = launch_fingerprint if _on_card(outer, "fp32") and outer.dtype == torch.float32 else reference.fingerprint_parts
    return take(outer, momentum)


def launch_fingerprint(outer: Tensor, momentum: Tensor) -> Tensor:
    """Launches the Triton kernel; arguments as of `fingerprint_parts`, contiguous float32."""
    n, blocks, parts = outer.numel(), num_blocks(outer.numel()), _empty_parts(outer)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (outer, momentum))
    if n:
        fingerprint_pass[(triton.cdiv(blocks, ROWS),)](
            outer, momentum, parts, n, blocks, MIX_BLOCK, MIX_OUTER, MIX_MOMENTUM, BLOCK, ROWS, num_warps=4
        )
    return parts


def _empty_parts(state: Tensor) -> Tensor:
    return torch.empty(num_blocks(state.numel()), dtype=torch.int64, device=state.device)


def launch_outer_update(
    codes: Tensor, scales: Tensor, outer: Tensor, momentum: Tensor, inner: Tensor, prints: Tensor,
    lr: float, mu: float, keep: float, format: str, first: int = 0,
) -> None:  # fmt: skip
    """Launches the Triton kernel; arguments as of `outer_update`, all contiguous float32."""
    n, blocks = outer.numel(), num_blocks(outer.numel())
    check_codes(format, blocks, codes, scales)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (outer, momentum, inner))
    if n:
        update_pass[(triton.cdiv(blocks, ROWS),)](
            codes, scales, outer, momentum, inner, prints, n, blocks, first, lr, mu, keep, MIX_BLOCK,
            MIX_OUTER, MIX_MOMENTUM, bool(prints.numel()), format, BLOCK, ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


for _operator in (encode, reduce, outer_update):
    _operator.register_fake(lambda *arguments: None)
fingerprint_parts.register_fake(lambda outer, momentum: _empty_parts(outer))
