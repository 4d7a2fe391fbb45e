"""Muon (Jordan et al. 2024): momentum, orthogonalisation, and the update of the weights.

Shapes: L matrices of equal shape, M rows, N columns, S the smaller of both.

The matmuls are the library's, batched over matrices of equal shape, with additions in their epilogues. What is left is
elementwise and fused into one pass before them and one after. Floors, with float32 states and a bf16 update:
`muon_momentum` 14 bytes an element (read gradient and momentum, write momentum and update), `muon_apply` 10.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    from factory_train.kernels.rounding import round_to

    @triton.jit
    def momentum_pass(momentum, grad, update, divisor, skip, n, BETA: tl.constexpr, BLOCK: tl.constexpr):
        """Averages the gradient into the momentum and writes the Nesterov look-ahead."""
        if tl.load(skip) != 0:
            return
        # 64 bits: offsets pass 2^31.
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) / tl.load(divisor).to(tl.float32)
        m = tl.load(momentum + at, mask=inside, other=0.0).to(tl.float32)
        m += (1.0 - BETA) * (g - m)
        tl.store(momentum + at, round_to(m, momentum.dtype.element_ty), mask=inside)
        tl.store(update + at, round_to(g + BETA * (m - g), update.dtype.element_ty), mask=inside)

    @triton.jit
    def apply_pass(weight, update, skip, n, keep, rate, BLOCK: tl.constexpr):
        """Decays the weights and takes the step."""
        if tl.load(skip) != 0:
            return
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(weight + at, round_to(w * keep - rate * o, weight.dtype.element_ty), mask=inside)


# Coefficients of x, x^3 and x^5, iteration by iteration: Polar Express (Amsel et al. 2025, arXiv 2505.16932) for singular
# values from 1e-3 to 1. Five of them bring those to 0.84 ... 1.13; more converge to 1.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# Room for rounding: iterations but the last are made for singular values up to this.
_SAFETY = 1.01
BLOCK = 4096


def coefficients(steps: int) -> list[tuple[float, float, float]]:
    """Returns the coefficients of each of `steps` iterations, the room for rounding included."""
    chosen = [_POLAR_EXPRESS[min(step, len(_POLAR_EXPRESS) - 1)] for step in range(steps)]
    return [(a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in chosen[:-1]] + chosen[-1:]


def orthogonalize(x_LMN: Tensor, steps: int) -> Tensor:
    """Returns the matrices with their singular values brought close to 1, in the type they come in.

    A matrix of zeros stays one. FLOPs: 2 steps L S^2 (2 max(M, N) + S).

    Args:
        x_LMN: a batch of matrices.
        steps: iterations; 5 is the usual number.
    """
    wide = torch.promote_types(x_LMN.dtype, torch.float32)
    norm_L11 = torch.linalg.vector_norm(x_LMN, dim=(1, 2), keepdim=True, dtype=wide).clamp_(min=1e-20)
    x = (x_LMN / (norm_L11 * _SAFETY)).to(x_LMN.dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for a, b, c in coefficients(steps):
        gram_LSS = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram_LSS, gram_LSS, gram_LSS, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


@torch.library.custom_op("factory_train::muon_momentum", mutates_args=("momentum", "update"))
def muon_momentum(momentum: Tensor, grad: Tensor, update: Tensor, divisor: Tensor, skip: Tensor, beta: float) -> None:
    """Averages a gradient into the momentum and writes the Nesterov look-ahead into `update`.

    Args:
        momentum: running average of gradients, changed in place.
        grad: of the same shape.
        update: of the same shape, of any floating type; left undefined in a skipped step.
        divisor: what gradients are divided by (clipping); scalar on the device.
        skip: 1.0 leaves the momentum as it is, bit for bit; scalar on the device.
        beta: part of the average that is kept.
    """
    if HAS_TRITON and momentum.is_cuda and momentum.dtype != torch.float64:
        launch_momentum(momentum, grad, update, divisor, skip, beta)
    else:
        reference_momentum(momentum, grad, update, divisor, skip, beta)


@muon_momentum.register_fake
def _(momentum: Tensor, grad: Tensor, update: Tensor, divisor: Tensor, skip: Tensor, beta: float) -> None:
    pass


def reference_momentum(momentum: Tensor, grad: Tensor, update: Tensor, divisor: Tensor, skip: Tensor, beta: float) -> None:
    """The same in plain torch."""
    scaled = grad.to(momentum.dtype) / divisor.to(momentum.dtype)
    average = torch.lerp(momentum, scaled, 1 - beta)
    update.copy_(torch.lerp(scaled, average, beta))
    torch.where(skip > 0, momentum, average, out=momentum)


def launch_momentum(momentum: Tensor, grad: Tensor, update: Tensor, divisor: Tensor, skip: Tensor, beta: float) -> None:
    """Launches the Triton kernel; arguments as of `muon_momentum`, all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (momentum, grad, update))
    n = momentum.numel()
    if n:
        momentum_pass[(triton.cdiv(n, BLOCK),)](momentum, grad, update, divisor, skip, n, beta, BLOCK, num_warps=8)


@torch.library.custom_op("factory_train::muon_apply", mutates_args=("weight",))
def muon_apply(weight: Tensor, update: Tensor, skip: Tensor, keep: float, rate: float) -> None:
    """Makes of the weights `keep` x weight - `rate` x update, in place; `skip` as of `muon_momentum`."""
    if HAS_TRITON and weight.is_cuda and weight.dtype != torch.float64:
        launch_apply(weight, update, skip, keep, rate)
    else:
        reference_apply(weight, update, skip, keep, rate)


@muon_apply.register_fake
def _(weight: Tensor, update: Tensor, skip: Tensor, keep: float, rate: float) -> None:
    pass


def reference_apply(weight: Tensor, update: Tensor, skip: Tensor, keep: float, rate: float) -> None:
    """The same in plain torch."""
    moved = torch.add(weight * keep, update.to(weight.dtype), alpha=-rate)
    torch.where(skip > 0, weight, moved, out=weight)


def launch_apply(weight: Tensor, update: Tensor, skip: Tensor, keep: float, rate: float) -> None:
    """Launches the Triton kernel; arguments as of `muon_apply`, all contiguous."""
    assert all(tensor.is_contiguous() for tensor in (weight, update))
    n = weight.numel()
    if n:
        apply_pass[(triton.cdiv(n, BLOCK),)](weight, update, skip, n, keep, rate, BLOCK, num_warps=8)
