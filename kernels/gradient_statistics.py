"""What an optimizer step has to know of its gradients before it begins, without the host learning it.

`gradient_squares` reads the gradients once (floor: 4 bytes an element in float32, 2 in bfloat16) and leaves partial sums
of their squares. `prepare_step`, one program, makes of them the norm, whether the step is to be skipped, the factor
of clipping, bias corrections, and the few float32 numbers a group of parameters the update needs. Sums over programs, powers of betas
and differences from one are in float64: in float32, 1 - beta2 is off by 3e-5 where beta2 is 0.999.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from factory_train.kernels.addresses import BOOK
from factory_train.kernels.launch_table import launch_parameters

# Columns of `hyper`, float64, one row a group of parameters. MAX_NORM 0 turns clipping off.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAX_NORM, HYPER_SIZE = range(7)
# Columns of `control`, float32, one row a group: factor of decay, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps,
# 1 - beta1, 1 - beta2, factor of clipping.
KEEP, RATE, INVERSE_ROOT, EPSILON, FRESH1, FRESH2, CLIP, CONTROL_SIZE = (*range(7), 8)
# Partial sums, at most: what one program adds up.
MAX_PARTIALS = 1024

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def squares_of_buffer(grad, partials, n, ITERATIONS: tl.constexpr, BLOCK: tl.constexpr):
        """Each program adds up every so-manieth block: the order is fixed, so the sum is the same every time."""
        # 64 bits: offsets pass 2^31.
        program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(ITERATIONS):
            at = (i * programs + program) * BLOCK + tl.arange(0, BLOCK)
            g = tl.load(grad + at, mask=at < n, other=0.0).to(tl.float32)
            total += g * g
        tl.store(partials + program, tl.sum(total.to(tl.float64)))

    @triton.jit
    def squares_of_tensors(
        addresses,
        tile_tensor,
        tile_first,
        sizes,
        partials,
        num_tiles,
        ITERATIONS: tl.constexpr,
        BLOCK: tl.constexpr,
        NARROW: tl.constexpr,
        ALIGNED: tl.constexpr,
    ):
        """The same over the tiles of many tensors; NARROW ones are bfloat16."""
        program, programs = tl.program_id(0), tl.num_programs(0)
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(ITERATIONS):
            tile = i * programs + program
            real = tile < num_tiles
            tensor = tl.load(tile_tensor + tile, mask=real, other=0)
            # Of what comes from memory Triton knows nothing, and without these hints it loads one element at a time.
            first = tl.multiple_of(tl.load(tile_first + tile, mask=real, other=0), BLOCK)
            size = tl.load(sizes + tensor, mask=real, other=0)
            grad = tl.load(addresses + tensor).to(tl.pointer_type(tl.bfloat16 if NARROW else tl.float32))
            if ALIGNED:
                size = tl.multiple_of(size, 16)
                grad = tl.multiple_of(grad, 16)
            at = first + tl.arange(0, BLOCK)
            g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
            total += g * g
        tl.store(partials + program, tl.sum(total.to(tl.float64)))

    @triton.jit
    def prepare_pass(
        partials, num_partials, skip, hyper, control, step, norm, flag, num_groups, PARTIALS: tl.constexpr, GROUPS: tl.constexpr
    ):
        """One program: norm, decision, counter, and the numbers of each group."""
        part = tl.arange(0, PARTIALS)
        squares = tl.sum(tl.load(partials + part, mask=part < num_partials, other=0.0))
        length = tl.sqrt(squares)
        # A NaN is not below infinity either.
        bad = (tl.load(skip) != 0) | ~(squares < float("inf"))
        count = tl.load(step) + tl.where(bad, 0, 1)
        # A skipped first step has made none: any power will do, and its numbers are not used.
        power = tl.maximum(count, 1).to(tl.float64)
        group = tl.arange(0, GROUPS)
        inside = group < num_groups
        at = hyper + group * 6
        lr = tl.load(at, mask=inside, other=0.0)
        beta1 = tl.load(at + 1, mask=inside, other=0.5)
        beta2 = tl.load(at + 2, mask=inside, other=0.5)
        most = tl.load(at + 5, mask=inside, other=0.0)
        # Zero to the power of anything is zero, and its logarithm is no number.
        left1 = tl.where(beta1 > 0.0, tl.exp2(power * tl.log2(tl.where(beta1 > 0.0, beta1, 0.5))), 0.0)
        left2 = tl.where(beta2 > 0.0, tl.exp2(power * tl.log2(tl.where(beta2 > 0.0, beta2, 0.5))), 0.0)
        clip = tl.where((most > 0.0) & (length > most), most / length, 1.0)
        to = control + group * 8
        tl.store(to, (1.0 - lr * tl.load(at + 4, mask=inside, other=0.0)).to(tl.float32), mask=inside)
        tl.store(to + 1, (lr / (1.0 - left1)).to(tl.float32), mask=inside)
        tl.store(to + 2, (1.0 / tl.sqrt(1.0 - left2)).to(tl.float32), mask=inside)
        tl.store(to + 3, tl.load(at + 3, mask=inside, other=0.0).to(tl.float32), mask=inside)
        tl.store(to + 4, (1.0 - beta1).to(tl.float32), mask=inside)
        tl.store(to + 5, (1.0 - beta2).to(tl.float32), mask=inside)
        tl.store(to + 6, clip.to(tl.float32), mask=inside)
        tl.store(step, count)
        tl.store(norm, length)
        tl.store(flag, bad.to(tl.int32))
        tl.store(flag + 1, tl.load(flag + 1) + bad.to(tl.int32))


@torch.library.custom_op("factory_train::gradient_squares", mutates_args=("partials",))
def gradient_squares(partials: Tensor, grads: Sequence[Tensor]) -> None:
    """Writes partial sums of the squares of all gradients; their sum is the squared norm.

    Squares are taken in float32: an element beyond 1.8e19 makes the sum infinite, and the step is skipped.

    Args:
        partials: float64, written; of as many numbers as programs are to share the work, two at least, `MAX_PARTIALS` at most.
        grads: float32 or bfloat16, all of one type, contiguous, at any address; one that is empty counts for nothing.
    """
    if HAS_TRITON and partials.is_cuda:
        launch_squares(partials, grads)
    else:
        reference_squares(partials, grads)


@gradient_squares.register_fake
def _(partials: Tensor, grads: Sequence[Tensor]) -> None:
    pass


def reference_squares(partials: Tensor, grads: Sequence[Tensor]) -> None:
    """The same in plain torch."""
    partials.zero_()
    for grad in grads:
        if grad.numel():
            partials[0] += torch.linalg.vector_norm(grad.float()).square()


def launch_squares(partials: Tensor, grads: Sequence[Tensor]) -> None:
    """Launches the Triton kernel, once more for gradients that do not allow loads of 16 bytes; arguments as of `gradient_squares`."""
    grads = [grad for grad in grads if grad.numel()]
    if not grads:
        partials.zero_()
        return
    assert all(grad.is_contiguous() and grad.dtype == grads[0].dtype for grad in grads)
    assert partials.numel() >= 2
    device, programs = partials.device, partials.numel()
    parameters = launch_parameters("squares", str(grads[0].dtype).removeprefix("torch."), device)
    block = parameters["BLOCK"]
    if len(grads) == 1:
        n = grads[0].numel()
        squares_of_buffer[(programs,)](grads[0], partials, n, triton.cdiv(n, block * programs), **parameters)
        return
    table = BOOK.table([grads], (0,), block)
    # Programs go to the parts by their elements, one at least.
    first, numel = 0, sum(part.numel for part in table.parts)
    for part in table.parts:
        last = part is table.parts[-1]
        count = programs - first if last else min(max(1, programs * part.numel // numel), programs - 1)
        squares_of_tensors[(count,)](
            table.addresses,
            part.tensor,
            part.first,
            table.sizes,
            partials[first : first + count],
            part.count,
            triton.cdiv(part.count, count),
            NARROW=grads[0].dtype == torch.bfloat16,
            ALIGNED=part.aligned,
            **parameters,
        )
        first += count


@torch.library.custom_op("factory_train::prepare_step", mutates_args=("control", "step", "norm", "flag"))
def prepare_step(partials: Tensor, skip: Tensor, hyper: Tensor, control: Tensor, step: Tensor, norm: Tensor, flag: Tensor) -> None:
    """Decides about a step, and computes what the update needs, on the device.

    Args:
        partials: float64, at most `MAX_PARTIALS`; their sum, over all ranks, is the squared norm of the gradient.
        skip: 1.0 skips the step whatever the gradient is; scalar.
        hyper: float64, (groups, HYPER_SIZE).
        control: float32, (groups, CONTROL_SIZE), written.
        step: int64, (1,): updates made so far; counts one more unless the step is skipped.
        norm: float64, (1,), written.
        flag: int32, (2,): whether the step is skipped, written; and how many were, counted.
    """
    if HAS_TRITON and partials.is_cuda:
        launch_prepare(partials, skip, hyper, control, step, norm, flag)
    else:
        reference_prepare(partials, skip, hyper, control, step, norm, flag)


@prepare_step.register_fake
def _(partials: Tensor, skip: Tensor, hyper: Tensor, control: Tensor, step: Tensor, norm: Tensor, flag: Tensor) -> None:
    pass


def reference_prepare(partials: Tensor, skip: Tensor, hyper: Tensor, control: Tensor, step: Tensor, norm: Tensor, flag: Tensor) -> None:
    """The same in plain torch, without waiting for the device either."""
    squares = partials.sum()
    bad = (skip != 0) | ~(squares < float("inf"))
    norm.copy_(squares.sqrt())
    step.add_((~bad).to(step.dtype))
    flag[0] = bad
    flag[1] += bad
    power = step.clamp(min=1).double()
    lr, beta1, beta2, eps, weight_decay, most = hyper.unbind(1)
    clip = torch.where((most > 0) & (norm > most), most / norm, torch.ones_like(most))
    rows = (
        1 - lr * weight_decay,
        lr / (1 - beta1**power),
        1 / (1 - beta2**power).sqrt(),
        eps,
        1 - beta1,
        1 - beta2,
        clip,
    )
    control[:, :7] = torch.stack(rows, dim=1).to(torch.float32)


def launch_prepare(partials: Tensor, skip: Tensor, hyper: Tensor, control: Tensor, step: Tensor, norm: Tensor, flag: Tensor) -> None:
    """Launches the Triton kernel; arguments as of `prepare_step`."""
    assert partials.numel() <= MAX_PARTIALS
    assert hyper.shape[1] == HYPER_SIZE
    sizes = {"PARTIALS": triton.next_power_of_2(partials.numel()), "GROUPS": triton.next_power_of_2(hyper.shape[0])}
    prepare_pass[(1,)](partials, partials.numel(), skip, hyper, control, step, norm, flag, hyper.shape[0], **sizes, num_warps=4)
