"""AdamW (Loshchilov and Hutter 2019) in one pass: clipping, decay, update, narrow weights and narrow states together.

Weights are float32, or a bfloat16 and an int16 remainder that together are that float32 exactly (`split_float`). States are float32,
bfloat16, or 8-bit codes with a scale for every 256 elements (`block_codes`); arithmetic is float32 whatever is stored. Rows below are
such blocks of 256 elements.

Two layouts. In a flat one all parameters of a kind lie in one buffer, each beginning at a multiple of 256, with a table that
says for each row which group of hyper-parameters it is of. In a list they lie anywhere, and a table says where.

Floor in bytes an element, gradients in float32 (in bfloat16 two less):

| weights | float32 states | bfloat16 | int8 |
|---|---|---|---|
| float32 | 28 | 20 | 16.06 |
| split | 28 | 20 | 16.06 |

With bfloat16 gradients, as split weights have: 26, 18, 14.06. A skipped step changes nothing, bit for bit.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from factory_train.kernels.addresses import BOOK
from factory_train.kernels.block_codes import BLOCK, decode_root, decode_signed, encode_root, encode_signed, exact_sqrt, in_blocks
from factory_train.kernels.launch_table import launch_parameters
from factory_train.kernels.split_float import join_float32, split_float32

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    from factory_train.kernels.block_codes import decode_root_rows, decode_signed_rows, encode_root_rows, encode_signed_rows
    from factory_train.kernels.rounding import round_to

    @triton.jit
    def update_rows(
        weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, control, row_inside, inside, SPLIT: tl.constexpr, CODES: tl.constexpr
    ):
        """The update of [rows, 256] elements; pointers are of that shape, those of scales and `control` are [rows]."""
        keep = tl.load(control, mask=row_inside, other=1.0)[:, None]
        rate = tl.load(control + 1, mask=row_inside, other=0.0)[:, None]
        inverse_root = tl.load(control + 2, mask=row_inside, other=1.0)[:, None]
        eps = tl.load(control + 3, mask=row_inside, other=1.0)[:, None]
        fresh1 = tl.load(control + 4, mask=row_inside, other=0.0)[:, None]
        fresh2 = tl.load(control + 5, mask=row_inside, other=0.0)[:, None]
        clip = tl.load(control + 6, mask=row_inside, other=1.0)[:, None]
        if SPLIT:
            high = tl.load(weight, mask=inside, other=0).to(tl.int32)
            low = tl.load(remainder, mask=inside, other=0).to(tl.int32)
            x = ((high << 16) + low).to(tl.float32, bitcast=True)
        else:
            x = tl.load(weight, mask=inside, other=0.0)
        g = tl.load(grad, mask=inside, other=0.0).to(tl.float32) * clip
        if CODES:
            m = decode_signed_rows(tl.load(exp_avg, mask=inside, other=0), tl.load(scale, mask=row_inside, other=0.0)[:, None])
            v = decode_root_rows(tl.load(exp_avg_sq, mask=inside, other=0), tl.load(scale_sq, mask=row_inside, other=0.0)[:, None])
        else:
            m = tl.load(exp_avg, mask=inside, other=0.0).to(tl.float32)
            v = tl.load(exp_avg_sq, mask=inside, other=0.0).to(tl.float32)
        m = m + (g - m) * fresh1
        v = v + (g * g - v) * fresh2
        root = tl.sqrt_rn(v)
        x = x * keep - tl.div_rn(rate * m, root * inverse_root + eps)
        if SPLIT:
            bits = x.to(tl.int32, bitcast=True)
            # Half up (split_float.py), without an addition that would pass the sign bit.
            high = ((bits >> 15) + 1) >> 1
            tl.store(weight, high.to(tl.int16), mask=inside)
            tl.store(remainder, (bits - (high << 16)).to(tl.int16), mask=inside)
        else:
            tl.store(weight, x, mask=inside)
        if CODES:
            codes, largest = encode_signed_rows(m)
            tl.store(exp_avg, codes, mask=inside)
            tl.store(scale, largest, mask=row_inside)
            codes, largest = encode_root_rows(root)
            tl.store(exp_avg_sq, codes, mask=inside)
            tl.store(scale_sq, largest, mask=row_inside)
        else:
            tl.store(exp_avg, round_to(m, exp_avg.dtype.element_ty), mask=inside)
            tl.store(exp_avg_sq, round_to(v, exp_avg_sq.dtype.element_ty), mask=inside)

    @triton.jit
    def adamw_buffer(
        weight,
        remainder,
        grad,
        exp_avg,
        exp_avg_sq,
        scale,
        scale_sq,
        groups,
        control,
        flag,
        num_rows,
        SPLIT: tl.constexpr,
        CODES: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Everything in flat buffers; `groups` has the group of each row."""
        if tl.load(flag) != 0:
            return
        # 64 bits: offsets pass 2^31.
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        row_inside = row < num_rows
        at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
        group = tl.load(groups + row, mask=row_inside, other=0).to(tl.int32)
        update_rows(
            weight + at,
            remainder + at,
            grad + at,
            exp_avg + at,
            exp_avg_sq + at,
            scale + row,
            scale_sq + row,
            control + group * 8,
            row_inside,
            tl.broadcast_to(row_inside[:, None], (ROWS, 256)),
            SPLIT,
            CODES,
        )

    @triton.jit
    def adamw_tensors_pass(
        addresses,
        num_tensors,
        tile_tensor,
        tile_first,
        sizes,
        groups,
        control,
        flag,
        SPLIT: tl.constexpr,
        CODES: tl.constexpr,
        NARROW_STATE: tl.constexpr,
        NARROW_GRAD: tl.constexpr,
        ALIGNED: tl.constexpr,
        ROWS: tl.constexpr,
    ):
        """Everything at addresses of a table, a tile of one tensor a program; `groups` has the group of each tensor."""
        if tl.load(flag) != 0:
            return
        tile = tl.program_id(0)
        tensor = tl.load(tile_tensor + tile)
        # Of what comes from memory Triton knows nothing, and without these hints it loads one element at a time.
        first = tl.multiple_of(tl.load(tile_first + tile), 256)
        size = tl.load(sizes + tensor)
        column = addresses + tensor
        weight = tl.load(column).to(tl.pointer_type(tl.int16 if SPLIT else tl.float32))
        grad = tl.load(column + num_tensors).to(tl.pointer_type(tl.bfloat16 if NARROW_GRAD else tl.float32))
        if CODES:
            exp_avg = tl.load(column + 2 * num_tensors).to(tl.pointer_type(tl.int8))
            exp_avg_sq = tl.load(column + 3 * num_tensors).to(tl.pointer_type(tl.uint8))
        else:
            state: tl.constexpr = tl.bfloat16 if NARROW_STATE else tl.float32
            exp_avg = tl.load(column + 2 * num_tensors).to(tl.pointer_type(state))
            exp_avg_sq = tl.load(column + 3 * num_tensors).to(tl.pointer_type(state))
        scale = tl.load(column + 4 * num_tensors).to(tl.pointer_type(tl.float32))
        scale_sq = tl.load(column + 5 * num_tensors).to(tl.pointer_type(tl.float32))
        remainder = tl.load(column + 6 * num_tensors).to(tl.pointer_type(tl.int16))
        if ALIGNED:
            size = tl.multiple_of(size, 16)
            weight = tl.multiple_of(weight, 16)
            grad = tl.multiple_of(grad, 16)
            exp_avg = tl.multiple_of(exp_avg, 16)
            exp_avg_sq = tl.multiple_of(exp_avg_sq, 16)
            remainder = tl.multiple_of(remainder, 16)
        start = first + tl.arange(0, ROWS) * 256
        at = start[:, None] + tl.arange(0, 256)[None, :]
        row = start // 256
        update_rows(
            weight + at,
            remainder + at,
            grad + at,
            exp_avg + at,
            exp_avg_sq + at,
            scale + row,
            scale_sq + row,
            control + tl.load(groups + tensor) * 8 + tl.zeros((ROWS,), tl.int32),
            start < size,
            at < size,
            SPLIT,
            CODES,
        )


# Rows that the reference works on at once: what stays in the cache.
_REFERENCE_ROWS = 256


@torch.library.custom_op("factory_train::adamw_flat", mutates_args=("weight", "remainder", "exp_avg", "exp_avg_sq", "scale", "scale_sq"))
def adamw_flat(
    weight: Tensor,
    remainder: Tensor | None,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scale: Tensor | None,
    scale_sq: Tensor | None,
    groups: Tensor,
    control: Tensor,
    flag: Tensor,
) -> None:
    """Updates flat buffers of N elements in place, N a multiple of 256.

    Args:
        weight: float32, or bfloat16 with `remainder`, int16.
        grad: float32 or bfloat16; zero between parameters.
        exp_avg, exp_avg_sq: float32 or bfloat16 moments; or int8 and uint8 codes with `scale` and `scale_sq`, float32, (N / 256,).
        groups: uint8, (N / 256,): the group of each row.
        control: of `prepare_step`.
        flag: of `prepare_step`; where its first number is not zero nothing is changed.
    """
    if HAS_TRITON and weight.is_cuda:
        launch_adamw_flat(weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, groups, control, flag)
    else:
        reference_adamw_flat(weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, groups, control, flag)


@adamw_flat.register_fake
def _(weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, groups, control, flag) -> None:
    pass


def reference_adamw_flat(weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, groups, control, flag) -> None:
    """The same in plain torch, a piece at a time."""
    if flag[0] != 0:
        return
    num_rows = weight.numel() // BLOCK
    rows = [None if tensor is None else tensor.view(num_rows, -1) for tensor in (weight, remainder, grad, exp_avg, exp_avg_sq)]
    for start in range(0, num_rows, _REFERENCE_ROWS):
        piece = slice(start, start + _REFERENCE_ROWS)
        parts = [None if tensor is None else tensor[piece] for tensor in (*rows, scale, scale_sq)]
        _reference_rows(parts, control[groups[piece].long()])


def _reference_rows(rows: Sequence[Any], control_R8: Tensor) -> None:
    """Updates rows in place, in the order of the kernel, without operators that skip a rounding."""
    weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq = rows
    keep, rate, inverse_root, eps, fresh1, fresh2, clip = (column.unsqueeze(1) for column in control_R8[:, :7].unbind(1))
    x = weight if remainder is None else join_float32(weight, remainder)
    g = grad.float() * clip
    m = exp_avg.float() if scale is None else decode_signed(exp_avg, scale)
    v = exp_avg_sq.float() if scale_sq is None else decode_root(exp_avg_sq, scale_sq)
    m = m + (g - m) * fresh1
    v = v + (g * g - v) * fresh2
    root = exact_sqrt(v)
    x = x * keep - (rate * m) / (root * inverse_root + eps)
    if remainder is None:
        weight.copy_(x)
    else:
        for target, half in zip((weight, remainder), split_float32(x), strict=True):
            target.copy_(half)
    if scale is None:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    else:
        for targets, coded in (((exp_avg, scale), encode_signed(m)), ((exp_avg_sq, scale_sq), encode_root(root))):
            for target, value in zip(targets, coded, strict=True):
                target.copy_(value)


def launch_adamw_flat(weight, remainder, grad, exp_avg, exp_avg_sq, scale, scale_sq, groups, control, flag) -> None:
    """Launches the Triton kernel; arguments as of `adamw_flat`."""
    assert all(tensor.is_contiguous() for tensor in (weight, grad, exp_avg, exp_avg_sq))
    num_rows = weight.numel() // BLOCK
    assert num_rows * BLOCK == weight.numel()
    split, codes = remainder is not None, scale is not None
    parameters = _parameters(exp_avg)
    if num_rows:
        adamw_buffer[(triton.cdiv(num_rows, parameters["ROWS"]),)](
            weight.view(torch.int16) if split else weight,
            remainder if split else weight,
            grad,
            exp_avg,
            exp_avg_sq,
            scale if codes else weight,
            scale_sq if codes else weight,
            groups,
            control,
            flag,
            num_rows,
            SPLIT=split,
            CODES=codes,
            **parameters,
        )


def _parameters(exp_avg: Tensor) -> dict[str, int | bool]:
    # Memory sets the pace, and without fused multiply-add a card rounds as a CPU does.
    return launch_parameters("adamw", str(exp_avg.dtype).removeprefix("torch."), exp_avg.device) | {"enable_fp_fusion": False}


@torch.library.custom_op(
    "factory_train::adamw_tensors", mutates_args=("weights", "remainders", "exp_avgs", "exp_avg_sqs", "scales", "scales_sq")
)
def adamw_tensors(
    weights: Sequence[Tensor],
    remainders: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Sequence[Tensor],
    scales_sq: Sequence[Tensor],
    groups: Tensor,
    control: Tensor,
    flag: Tensor,
) -> None:
    """Updates tensors that lie anywhere, in one launch. What is empty in a list of none is as of None in `adamw_flat`.

    Args:
        weights, remainders, grads, exp_avgs, exp_avg_sqs: contiguous, of any size; alike in type within a list.
        scales, scales_sq: (ceil(numel / 256),) each.
        groups: int32, the group of each tensor.
        control, flag: of `prepare_step`.
    """
    if HAS_TRITON and weights and weights[0].is_cuda:
        launch_adamw_tensors(weights, remainders, grads, exp_avgs, exp_avg_sqs, scales, scales_sq, groups, control, flag)
    else:
        reference_adamw_tensors(weights, remainders, grads, exp_avgs, exp_avg_sqs, scales, scales_sq, groups, control, flag)


@adamw_tensors.register_fake
def _(weights, remainders, grads, exp_avgs, exp_avg_sqs, scales, scales_sq, groups, control, flag) -> None:
    pass


def reference_adamw_tensors(weights, remainders, grads, exp_avgs, exp_avg_sqs, scales, scales_sq, groups, control, flag) -> None:
    """The same in plain torch."""
    if flag[0] != 0:
        return
    for index, weight in enumerate(weights):
        tensors = [weight, remainders[index] if remainders else None, grads[index], exp_avgs[index], exp_avg_sqs[index]]
        rows: list[Any] = [None if tensor is None else in_blocks(tensor) for tensor in tensors]
        coded = (scales[index], scales_sq[index]) if scales else (None, None)
        row_groups = torch.full((len(rows[0]),), int(groups[index]), dtype=torch.uint8, device=weight.device)
        flat = [None if row is None else row.reshape(-1) for row in rows]
        reference_adamw_flat(flat[0], flat[1], flat[2], flat[3], flat[4], coded[0], coded[1], row_groups, control, flag)
        for tensor, row in zip(tensors, rows, strict=True):
            if tensor is not None and row.data_ptr() != tensor.data_ptr():
                tensor.copy_(row.view(-1)[: tensor.numel()].view(tensor.shape))


def launch_adamw_tensors(weights, remainders, grads, exp_avgs, exp_avg_sqs, scales, scales_sq, groups, control, flag) -> None:
    """Launches the Triton kernel, once more for tensors that do not allow loads of 16 bytes; arguments as of `adamw_tensors`."""
    assert all(tensor.is_contiguous() for tensors in (weights, grads, exp_avgs, exp_avg_sqs) for tensor in tensors)
    parameters = _parameters(exp_avgs[0])
    lists = (weights, grads, exp_avgs, exp_avg_sqs, scales or weights, scales_sq or weights, remainders or weights)
    table = BOOK.table(lists, (0, 1, 2, 3, 6), parameters["ROWS"] * BLOCK)
    for part in table.parts:
        if part.count:
            adamw_tensors_pass[(part.count,)](
                table.addresses,
                len(weights),
                part.tensor,
                part.first,
                table.sizes,
                groups,
                control,
                flag,
                SPLIT=bool(remainders),
                CODES=bool(scales),
                NARROW_STATE=exp_avgs[0].dtype == torch.bfloat16,
                NARROW_GRAD=grads[0].dtype == torch.bfloat16,
                ALIGNED=part.aligned,
                **parameters,
            )
