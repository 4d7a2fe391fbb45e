"""The three passes of a DiLoCo synchronisation: encode the pseudo-gradient, reduce encoded shards, take the outer step.

A fragment is a flat tensor of n elements in blocks of `BLOCK`, the last one maybe short. Encoded it is a tensor of codes
(uint8) and, for int8 and int4, one float32 scale a block:

    format   codes of a block              decoded
    fp64     8 BLOCK bytes                 the value
    fp32     4 BLOCK bytes                 the value
    bf16     2 BLOCK bytes, nearest even   the value
    int8     BLOCK bytes, -127 ... 127     code x scale, scale = largest magnitude of the block / 127
    int4     BLOCK / 2 bytes, -7 ... 7     the same with 7; element 2i in the low half of byte i, each plus 8

Floors in bytes an element, float32 state and error, int8, M islands: `encode` 17 (read outer, inner, error; write code, error; 12
without error feedback plus the code), `reduce` 1 + 1 / M, `outer_update` 25 (read code, outer, momentum, inner; write the three).

All islands decode the same bytes with the same arithmetic, fused multiply-adds switched off, so that what they make of them is
bit-identical. The fingerprint sums the bits of outer parameters and momentum times odd numbers that depend on the place, modulo
2^32 an element and 2^64 in all: no single flipped bit leaves it unchanged.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256
# Bytes of the codes of one block.
CODE_BYTES = {"fp64": 8 * BLOCK, "fp32": 4 * BLOCK, "bf16": 2 * BLOCK, "int8": BLOCK, "int4": BLOCK // 2}
_LARGEST = {"int8": 127.0, "int4": 7.0}
_FLOATS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
_SMALLEST_SCALE = 1.2e-38
# Odd, as signed numbers: of outer parameters and momentum within a block (32 bits), and of the block (64 bits).
_MIX_OUTER, _MIX_MOMENTUM, _MIX_BLOCK = 0x9E3779B1 - 2**32, 0x517CC1B7, 0x9E3779B97F4A7C15 - 2**64
# Blocks of one Triton program, and those the references work on at once.
ROWS, _AT_ONCE = 8, 256

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
            odd = 2 * tl.arange(0, BLOCK)[None, :] + 1
            bits = (w.to(tl.int32, bitcast=True) * (odd * MIX_OUTER)).to(tl.int64)
            bits += (v.to(tl.int32, bitcast=True) * (odd * MIX_MOMENTUM)).to(tl.int64)
            parts = tl.sum(tl.where(inside, bits, 0), axis=1) * ((2 * (first + rows) + 1) * mix_block)
            tl.store(prints + rows, parts, mask=rows < num_blocks)


def num_blocks(n: int) -> int:
    """Returns the number of blocks of a fragment of n elements."""
    return -(-n // BLOCK)


def has_scales(format: str) -> bool:
    """Returns whether a format has a scale a block."""
    return format in _LARGEST


def _on_card(tensor: Tensor, format: str) -> bool:
    return HAS_TRITON and tensor.is_cuda and format != "fp64"


def _check(format: str, blocks: int, codes: Tensor, scales: Tensor) -> None:
    assert codes.numel() == blocks * CODE_BYTES[format], (format, blocks, codes.shape)
    assert scales.numel() == (blocks if has_scales(format) else 0), (format, blocks, scales.shape)


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
        reference_encode(outer, inner, error, codes, scales, new_error, squares, format)


def reference_encode(
    outer: Tensor, inner: Tensor, error: Tensor, codes: Tensor, scales: Tensor, new_error: Tensor, squares: Tensor, format: str
) -> None:
    """The same in plain torch."""
    _check(format, num_blocks(outer.numel()), codes, scales)
    for at, code, block in _pieces(outer.numel(), format):
        x = outer[at] - inner[at]
        if error.numel():
            x += error[at]
        n, x = x.numel(), _rows(x)
        torch.linalg.vector_norm(x, dim=1, out=squares[block]).square_()
        decoded = _store(x, codes[code], scales[block], format)
        if error.numel():
            new_error[at] = x.sub_(decoded).view(-1)[:n]


def _rows(x: Tensor) -> Tensor:
    """Returns one block a row, with zeros at the end."""
    missing = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def _pieces(n: int, format: str) -> Iterator[tuple[slice, slice, slice]]:
    """Yields elements, bytes of codes and blocks of one piece after another: temporaries of a piece stay in the caches."""
    for first in range(0, num_blocks(n), _AT_ONCE):
        last, size = min(first + _AT_ONCE, num_blocks(n)), CODE_BYTES[format]
        yield slice(first * BLOCK, min(last * BLOCK, n)), slice(first * size, last * size), slice(first, last)


def _store(x: Tensor, codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """Encodes blocks (rows of x) and returns what they decode to, in the type of x."""
    if format in _FLOATS:
        return codes.view(_FLOATS[format]).view(x.shape).copy_(x).to(x.dtype)
    x, largest = x.to(torch.float32), _LARGEST[format]
    scale = x.abs().amax(dim=1, keepdim=True) / largest
    # The inverse of a smaller one overflows.
    inverse = torch.where(scale > _SMALLEST_SCALE, 1.0 / scale, 0.0)
    code = (x * inverse).add_(0.5).floor_().clamp_(-largest, largest)
    scales.copy_(scale.view(-1))
    decoded = code * scale
    # A code of a block that is not finite means nothing, but has to be one.
    code.nan_to_num_()
    if format == "int8":
        codes.view(torch.int8).copy_(code.view(-1))
    else:
        # Two codes as one number, the first in its lower byte; the cast keeps only that.
        pairs = (code.to(torch.int8) + 8).view(-1).view(torch.int16)
        codes.copy_(pairs | (pairs >> 4))
    return decoded


def _load(codes: Tensor, scales: Tensor, format: str) -> Tensor:
    """Returns the decoded blocks, one a row, in float32 (fp64: float64)."""
    blocks = codes.numel() // CODE_BYTES[format]
    if format in _FLOATS:
        values = codes.view(_FLOATS[format]).view(blocks, BLOCK)
        return values if format == "fp64" else values.float()
    if format == "int8":
        code = codes.view(torch.int8).float()
    else:
        pairs = codes.to(torch.int16)
        code = (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.int8).sub_(8).float()
    return code.view(blocks, BLOCK).mul_(scales.view(-1, 1))


def launch_encode(
    outer: Tensor, inner: Tensor, error: Tensor, codes: Tensor, scales: Tensor, new_error: Tensor, squares: Tensor, format: str
) -> None:
    """Launches the Triton kernel; arguments as of `encode`, all contiguous float32."""
    n, blocks = outer.numel(), num_blocks(outer.numel())
    _check(format, blocks, codes, scales)
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
        reference_reduce(codes, scales, weights, out_codes, out_scales, format)


def reference_reduce(codes: Tensor, scales: Tensor, weights: Tensor, out_codes: Tensor, out_scales: Tensor, format: str) -> None:
    """The same in plain torch; products before sums, each rounded, as in the kernel."""
    blocks = out_codes.numel() // CODE_BYTES[format]
    _check(format, blocks, out_codes, out_scales)
    for _, code, block in _pieces(blocks * BLOCK, format):
        total = torch.zeros(block.stop - block.start, BLOCK, dtype=weights.dtype, device=codes.device)
        for member, weight in enumerate(weights.tolist()):
            if weight:
                total += _load(codes[member, code], scales[member, block], format) * weight
        _store(total, out_codes[code], out_scales[block], format)


def launch_reduce(codes: Tensor, scales: Tensor, weights: Tensor, out_codes: Tensor, out_scales: Tensor, format: str) -> None:
    """Launches the Triton kernel; arguments as of `reduce`, all contiguous."""
    blocks = out_codes.numel() // CODE_BYTES[format]
    _check(format, blocks, out_codes, out_scales)
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
        reference_outer_update(codes, scales, outer, momentum, inner, prints, lr, mu, keep, format, first)


def reference_outer_update(
    codes: Tensor, scales: Tensor, outer: Tensor, momentum: Tensor, inner: Tensor, prints: Tensor,
    lr: float, mu: float, keep: float, format: str, first: int = 0,
) -> None:  # fmt: skip
    """The same in plain torch; products before sums, each rounded, as in the kernel."""
    _check(format, num_blocks(outer.numel()), codes, scales)
    mixes = _mixes(outer)
    for at, code, block in _pieces(outer.numel(), format):
        w, v = outer[at], momentum[at]
        g = _load(codes[code], scales[block], format).view(-1)[: w.numel()].to(w.dtype)
        v.mul_(mu).add_(g)
        w.sub_((v * mu).add_(g).mul_(lr))
        inner[at] = inner[at].mul_(keep).add_(w * (1.0 - keep)) if keep else w
        if prints.numel():
            prints[block] = _fingerprint_parts(w, v, mixes, first + block.start)


def fingerprint_parts(outer: Tensor, momentum: Tensor) -> Tensor:
    """Returns the parts of the fingerprint of a state, one a block; their sum modulo 2^64 is the fingerprint."""
    mixes = _mixes(outer)
    pieces = [_fingerprint_parts(outer[at], momentum[at], mixes, block.start) for at, _, block in _pieces(outer.numel(), "fp32")]
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64, device=outer.device)


def _mixes(state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the words of a block are multiplied by: those of outer parameters, and those of momentum."""
    # A float64 is two words of 32 bits.
    odd = 2 * torch.arange(state.element_size() // 4 * BLOCK, dtype=torch.int32, device=state.device) + 1
    return odd * _MIX_OUTER, odd * _MIX_MOMENTUM


def _fingerprint_parts(outer: Tensor, momentum: Tensor, mixes: tuple[Tensor, Tensor], first: int) -> Tensor:
    """The same of a piece whose first block has the number `first`."""
    pairs = zip((outer, momentum), mixes, strict=True)
    parts = [(_rows(state).view(torch.int32) * mix).sum(dim=1, dtype=torch.int64) for state, mix in pairs]
    blocks = torch.arange(first, first + len(parts[0]), device=outer.device)
    return (parts[0] + parts[1]) * ((2 * blocks + 1) * _MIX_BLOCK)


def launch_outer_update(
    codes: Tensor, scales: Tensor, outer: Tensor, momentum: Tensor, inner: Tensor, prints: Tensor,
    lr: float, mu: float, keep: float, format: str, first: int = 0,
) -> None:  # fmt: skip
    """Launches the Triton kernel; arguments as of `outer_update`, all contiguous float32."""
    n, blocks = outer.numel(), num_blocks(outer.numel())
    _check(format, blocks, codes, scales)
    assert all(tensor.is_contiguous() and tensor.dtype == torch.float32 for tensor in (outer, momentum, inner))
    if n:
        update_pass[(triton.cdiv(blocks, ROWS),)](
            codes, scales, outer, momentum, inner, prints, n, blocks, first, lr, mu, keep, _MIX_BLOCK,
            _MIX_OUTER, _MIX_MOMENTUM, bool(prints.numel()), format, BLOCK, ROWS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


for _operator in (encode, reduce, outer_update):
    _operator.register_fake(lambda *arguments: None)
