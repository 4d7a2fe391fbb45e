"""The passes of `kernels.pseudogradient` in plain torch: on CPUs, for float64, and what the kernels are compared with.

Piece by piece, so that what is computed of one stays in the caches. Products before sums, each rounded, as the kernels do it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from factory_train.kernels.pseudogradient_format import (
    BLOCK,
    CODE_BYTES,
    FLOATS,
    LARGEST,
    MIX_BLOCK,
    MIX_MOMENTUM,
    MIX_OUTER,
    SMALLEST_SCALE,
    check_codes,
    num_blocks,
)

# Blocks of a piece.
_AT_ONCE = 512


def encode(
    outer: Tensor, inner: Tensor, error: Tensor, codes: Tensor, scales: Tensor, new_error: Tensor, squares: Tensor, format: str
) -> None:
    """Encodes outer - inner + error; see `pseudogradient.encode`."""
    check_codes(format, num_blocks(outer.numel()), codes, scales)
    room, more = _rooms(outer.numel(), outer, 2)
    for at, code, block in _pieces(outer.numel(), format):
        padded = _values(codes[code], format, room[: (block.stop - block.start) * BLOCK])
        x = torch.sub(outer[at], inner[at], out=padded[: at.stop - at.start])
        padded[x.numel() :].zero_()
        if error.numel():
            x += error[at]
        rows = padded.view(-1, BLOCK)
        torch.linalg.vector_norm(rows, dim=1, out=squares[block]).square_()
        decoded = _store(rows, codes[code], scales[block], format, more)
        if error.numel():
            torch.sub(x, decoded.view(-1)[: x.numel()], out=new_error[at])


def _rooms(n: int, like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Returns room for what is computed of each piece of n elements: fresh memory for each costs more than what is done in it."""
    size = min(num_blocks(n), _AT_ONCE) * BLOCK
    return tuple(torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(count))


def _values(codes: Tensor, format: str, room: Tensor) -> Tensor:
    """Returns where values to be encoded are computed: in the codes' own memory where these are the values, else in `room`."""
    return codes.view(room.dtype) if FLOATS.get(format) == room.dtype else room


def _rows(x: Tensor) -> Tensor:
    """Returns one block a row, with zeros at the end."""
    missing = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).view(-1, BLOCK)


def _pieces(n: int, format: str) -> Iterator[tuple[slice, slice, slice]]:
    """Yields elements, bytes of codes and blocks of one piece after another: temporaries of a piece stay in the caches."""
    for first in range(0, num_blocks(n), _AT_ONCE):
        last, size = min(first + _AT_ONCE, num_blocks(n)), CODE_BYTES[format]
        yield slice(first * BLOCK, min(last * BLOCK, n)), slice(first * size, last * size), slice(first, last)


def _store(x: Tensor, codes: Tensor, scales: Tensor, format: str, room: Tensor) -> Tensor:
    """Encodes blocks (rows of x) and returns what they decode to, in the type of x; in `room` maybe, or x itself."""
    if format in FLOATS:
        values = codes.view(FLOATS[format])
        return x if values.data_ptr() == x.data_ptr() else values.view(x.shape).copy_(x).to(x.dtype)
    x, largest = x.to(torch.float32), LARGEST[format]
    code = (room if room.dtype == x.dtype else torch.empty_like(x).view(-1))[: x.numel()].view(x.shape)
    scale = torch.abs(x, out=code).amax(dim=1, keepdim=True) / largest
    inverse = torch.where(scale > SMALLEST_SCALE, 1.0 / scale, 0.0)
    torch.mul(x, inverse, out=code).add_(0.5).floor_().clamp_(-largest, largest)
    scales.copy_(scale.view(-1))
    # A code of a block that is not finite means nothing, but has to be one.
    numbers = code if scale.isfinite().all() else code.nan_to_num()
    if format == "int8":
        codes.view(torch.int8).view(x.shape).copy_(numbers)
    else:
        # Two codes as one number, the first in its lower byte; the cast keeps only that.
        pairs = numbers.to(torch.int8).add_(8).view(-1).view(torch.int16)
        codes.copy_(pairs | (pairs >> 4))
    return code.mul_(scale)


def decode(codes: Tensor, scales: Tensor, format: str, room: Tensor | None = None) -> Tensor:
    """Returns the decoded blocks, one a row, in float32 (fp64: float64): the codes themselves where they are that, else in `room`."""
    blocks = codes.numel() // CODE_BYTES[format]
    values = (torch.empty(blocks * BLOCK, device=codes.device) if room is None else room[: blocks * BLOCK]).view(blocks, BLOCK)
    if format in FLOATS:
        stored = codes.view(FLOATS[format]).view(blocks, BLOCK)
        return stored if stored.dtype in (torch.float32, torch.float64) else values.copy_(stored)
    if format == "int8":
        numbers = codes.view(torch.int8)
    else:
        pairs = codes.to(torch.int16)
        numbers = (pairs | (pairs << 4)).bitwise_and_(0x0F0F).view(torch.int8).sub_(8)
    return values.copy_(numbers.view(blocks, BLOCK)).mul_(scales.view(-1, 1))


def reduce(
    codes: Sequence[Tensor] | Tensor,
    scales: Sequence[Tensor] | Tensor,
    weights: Tensor,
    out_codes: Tensor,
    out_scales: Tensor,
    format: str,
) -> None:
    """Encodes the weighted sum; see `pseudogradient.reduce`. What members sent may also lie apart, in a sequence."""
    blocks = out_codes.numel() // CODE_BYTES[format]
    check_codes(format, blocks, out_codes, out_scales)
    shares = weights.tolist()
    members = [member for member, share in enumerate(shares) if share]
    room, more = _rooms(blocks * BLOCK, weights, 2)
    for at, code, block in _pieces(blocks * BLOCK, format):
        total = _values(out_codes[code], format, room[: at.stop - at.start]).view(-1, BLOCK)
        if not members:
            total.zero_()
        for member in members:
            values = decode(codes[member][code], scales[member][block], format, more)
            if member == members[0]:
                # The kernel begins from zero, which makes a negative one positive.
                torch.mul(values, shares[member], out=total).add_(0.0)
            else:
                total += torch.mul(values, shares[member], out=more[: total.numel()].view(total.shape))
        _store(total, out_codes[code], out_scales[block], format, more)


def outer_update(
    codes: Tensor, scales: Tensor, outer: Tensor, momentum: Tensor, inner: Tensor, prints: Tensor,
    lr: float, mu: float, keep: float, format: str, first: int = 0,
) -> None:  # fmt: skip
    """Takes the outer step; see `pseudogradient.outer_update`."""
    check_codes(format, num_blocks(outer.numel()), codes, scales)
    mixes, words = _mixes(outer), _words(outer)
    (decoded,), (room,) = _rooms(outer.numel(), scales, 1), _rooms(outer.numel(), outer, 1)
    for at, code, block in _pieces(outer.numel(), format):
        w, v, x, step = outer[at], momentum[at], inner[at], room[: at.stop - at.start]
        g = decode(codes[code], scales[block], format, decoded).view(-1)[: w.numel()].to(w.dtype)
        v.mul_(mu).add_(g)
        w.sub_(torch.mul(v, mu, out=step).add_(g).mul_(lr))
        if keep:
            x.mul_(keep).add_(torch.mul(w, 1.0 - keep, out=step))
        else:
            x.copy_(w)
        if prints.numel():
            prints[block] = _sums(w, v, mixes, words)
    _place(prints, first)


def fingerprint_parts(outer: Tensor, momentum: Tensor) -> Tensor:
    """Returns the parts of the fingerprint of a state; see `pseudogradient.fingerprint_parts`."""
    mixes, words = _mixes(outer), _words(outer)
    prints = torch.empty(num_blocks(outer.numel()), dtype=torch.int64, device=outer.device)
    for at, _, block in _pieces(outer.numel(), "fp32"):
        prints[block] = _sums(outer[at], momentum[at], mixes, words)
    _place(prints, 0)
    return prints


def _mixes(state: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the words of a block are multiplied by: those of outer parameters, and those of momentum."""
    odd = 2 * torch.arange(_words_in_block(state), dtype=torch.int32, device=state.device) + 1
    return odd * MIX_OUTER, odd * MIX_MOMENTUM


def _words_in_block(state: Tensor) -> int:
    # A float64 is two words of 32 bits.
    return state.element_size() // 4 * BLOCK


def _words(state: Tensor) -> Tensor:
    """Returns room for the words of a piece."""
    (room,) = _rooms(state.numel(), state, 1)
    return room.view(torch.int32).view(-1, _words_in_block(state))


def _sums(outer: Tensor, momentum: Tensor, mixes: tuple[Tensor, Tensor], room: Tensor) -> Tensor:
    """Returns the sum of each block's bits, times what they are multiplied by, modulo 2^32."""
    room = room[: num_blocks(outer.numel())]
    of_outer, of_momentum = (
        torch.mul(_rows(state).view(torch.int32), mix, out=room).sum(dim=1, dtype=torch.int32)
        for state, mix in zip((outer, momentum), mixes, strict=True)
    )
    return of_outer.add_(of_momentum)


def _place(sums: Tensor, first: int) -> None:
    """Makes the sums of blocks the fingerprint's parts, in place; the first of them has the number `first`."""
    blocks = torch.arange(first, first + len(sums), device=sums.device)
    sums.mul_((2 * blocks + 1) * MIX_BLOCK)
