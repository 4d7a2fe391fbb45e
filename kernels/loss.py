"""Cross-entropy of a linear output head, chunk by chunk, so that the logits of a batch never exist all at once.

Shapes: N tokens, D model width, V vocabulary, C tokens of a chunk.

A chunk's logits come from a library matmul. One pass in place turns them into their own gradient and gives the loss of
each row; two more matmuls make of it the gradients of hidden states and head. The forward pass does all of that, since
the gradient of a sum needs nothing from later, so logits are computed once: 6 N V D FLOPs in all, and at most
`CHUNK_BYTES` of logits whatever N and V are.

Floor of the pass in place: 6 bytes a bf16 logit (two reads, one write); 4 where a row's second read comes from the cache.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton
    import triton.language as tl

    from factory_train.kernels.rounding import round_to

    @triton.jit
    def cross_entropy_rows(
        logits,
        targets,
        losses,
        ignore_index,
        V: tl.constexpr,
        Z_LOSS: tl.constexpr,
        WITH_GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a row: an online log-sum-exp, then the gradient over the logits it came from."""
        # 64 bits: a chunk may hold more than 2^31 logits.
        row = tl.program_id(0).to(tl.int64)
        wide = tl.float64 if logits.dtype.element_ty == tl.float64 else tl.float32
        logits += row * V
        target = tl.load(targets + row)
        counts = target != ignore_index
        inside = (target >= 0) & (target < V)
        score = tl.load(logits + target, mask=inside, other=0.0).to(wide)
        peak = tl.full((), -float("inf"), wide)
        total = tl.full((), 0.0, wide)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < V, other=-float("inf")).to(wide)
            higher = tl.maximum(peak, tl.max(x, axis=0))
            # A row that begins with masked tokens (minus infinity) has no finite peak yet.
            base = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), axis=0)
            peak = higher
        log_sum = peak + tl.log(total)
        loss = log_sum - score + Z_LOSS * log_sum * log_sum
        # A target outside of the vocabulary makes the loss NaN: the step is then skipped and reported.
        tl.store(losses + row, tl.where(counts, tl.where(inside, loss, float("nan")), 0.0))
        if WITH_GRADIENT:
            # Other warps have read the target's score by now, which is overwritten below.
            tl.debug_barrier()
            weight = 1.0 + 2.0 * Z_LOSS * log_sum
            for start in range(0, V, BLOCK):
                at = start + tl.arange(0, BLOCK)
                x = tl.load(logits + at, mask=at < V, other=0.0).to(wide)
                gradient = tl.exp(x - log_sum) * weight - tl.where(at == target, 1.0, 0.0)
                gradient = tl.where(counts, gradient, 0.0)
                tl.store(logits + at, round_to(gradient, logits.dtype.element_ty), mask=at < V)


IGNORE_INDEX = -100
# Logits of one chunk. On cards: so many rows that the matmuls run at full speed; on CPUs: what stays near the caches.
CHUNK_BYTES = {"cuda": 1 << 29, "cpu": 1 << 24}


def chunk_rows(num_tokens: int, vocab_size: int, element_bytes: int, chunk_bytes: int) -> int:
    """Returns the rows of a chunk: chunks are alike in size, and their logits take `chunk_bytes` at most, one row at least."""
    most = max(1, chunk_bytes // (vocab_size * element_bytes))
    if num_tokens <= most:
        return max(1, num_tokens)
    rows = -(-num_tokens // -(-num_tokens // most))
    # Matmuls like multiples of 128.
    return min(-(-rows // 128) * 128, most // 128 * 128) if most >= 128 else rows


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("factory_train::cross_entropy_inplace", mutates_args=("logits_CV",))
def cross_entropy_inplace(logits_CV: Tensor, targets_C: Tensor, ignore_index: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Returns the loss of each row, (C,), in at least float32, and overwrites the logits with its gradient by them.

    Args:
        logits_CV: contiguous; left as they are unless `with_gradient`.
        targets_C: token ids, int64; `ignore_index` rows have neither loss nor gradient.
        z_loss: weight of the squared log-partition function.
    """
    if HAS_TRITON and logits_CV.is_cuda:
        return launch_cross_entropy(logits_CV, targets_C, ignore_index, z_loss, with_gradient)
    return reference_cross_entropy(logits_CV, targets_C, ignore_index, z_loss, with_gradient)


@cross_entropy_inplace.register_fake
def _(logits_CV: Tensor, targets_C: Tensor, ignore_index: int, z_loss: float, with_gradient: bool) -> Tensor:
    return logits_CV.new_empty(logits_CV.shape[0], dtype=_wide(logits_CV.dtype))


def reference_cross_entropy(logits_CV: Tensor, targets_C: Tensor, ignore_index: int, z_loss: float, with_gradient: bool) -> Tensor:
    """The same in plain torch: what runs on CPUs, and what the kernel is compared with."""
    counts_C = targets_C != ignore_index
    x_CV = logits_CV.to(_wide(logits_CV.dtype))
    log_sum_C = torch.logsumexp(x_CV, dim=-1)
    index_C1 = targets_C.where(counts_C, 0).unsqueeze(-1)
    loss_C = log_sum_C - x_CV.gather(-1, index_C1).squeeze(-1) + z_loss * log_sum_C.square()
    if with_gradient:
        # Without a copy where the logits are wide already.
        gradient_CV = torch.sub(x_CV, log_sum_C.unsqueeze(-1), out=x_CV).exp_()
        if z_loss:
            gradient_CV.mul_((1 + 2 * z_loss * log_sum_C).unsqueeze(-1))
        gradient_CV.scatter_add_(-1, index_C1, gradient_CV.new_full(index_C1.shape, -1.0))
        gradient_CV.masked_fill_(~counts_C.unsqueeze(-1), 0.0)
        if gradient_CV is not logits_CV:
            logits_CV.copy_(gradient_CV)
    return loss_C.where(counts_C, 0.0)


def launch_cross_entropy(logits_CV: Tensor, targets_C: Tensor, ignore_index: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Launches the Triton kernel; arguments and result as of `cross_entropy_inplace`."""
    assert all(tensor.is_contiguous() for tensor in (logits_CV, targets_C))
    rows, vocab_size = logits_CV.shape
    losses_C = torch.empty(rows, dtype=_wide(logits_CV.dtype), device=logits_CV.device)
    if rows:
        cross_entropy_rows[(rows,)](
            logits_CV, targets_C, losses_C, ignore_index, vocab_size, z_loss, with_gradient, **launch_parameters(vocab_size)
        )
    return losses_C


def launch_parameters(vocab_size: int) -> dict[str, int]:
    """Returns block size and warps of the row kernel. Chosen from the width of loads, not yet tuned on a card."""
    block = min(8192, max(128, triton.next_power_of_2(vocab_size)))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


@torch.library.custom_op("factory_train::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float, chunk_bytes: int, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the summed loss and its gradients by x and (in at least float32) by weight; unwanted gradients are empty."""
    num_tokens, vocab_size = x_ND.shape[0], weight_VD.shape[0]
    # What is multiplied has the type of the hidden states, as under autocast.
    head_VD = weight_VD.to(x_ND.dtype)
    grad_x_ND = torch.empty_like(x_ND) if want_x else x_ND.new_empty(0)
    accumulate = _wide(weight_VD.dtype)
    grad_weight_VD = weight_VD.new_zeros(weight_VD.shape if want_weight else (0,), dtype=accumulate)
    losses_N = x_ND.new_empty(num_tokens, dtype=_wide(x_ND.dtype))
    rows = chunk_rows(num_tokens, vocab_size, x_ND.element_size(), chunk_bytes)
    logits = x_ND.new_empty(min(rows, num_tokens), vocab_size)
    for start in range(0, num_tokens, rows):
        chunk = slice(start, min(start + rows, num_tokens))
        x_CD, logits_CV = x_ND[chunk], logits[: chunk.stop - start]
        torch.mm(x_CD, head_VD.t(), out=logits_CV)
        losses_N[chunk] = cross_entropy_inplace(logits_CV, targets_N[chunk], ignore_index, z_loss, want_x or want_weight)
        if want_x:
            torch.mm(logits_CV, head_VD, out=grad_x_ND[chunk])
        if want_weight:
            _add_matmul(grad_weight_VD, logits_CV.t(), x_CD)
    return losses_N.sum(), grad_x_ND, grad_weight_VD


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to a wider `total` without rounding the product first: the chunks' shares are summed in float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@_linear_cross_entropy.register_fake
def _(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int, z_loss: float, chunk_bytes: int, want_x: bool, want_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    loss = x_ND.new_empty((), dtype=_wide(x_ND.dtype))
    grad_x_ND = torch.empty_like(x_ND) if want_x else x_ND.new_empty(0)
    return loss, grad_x_ND, weight_VD.new_empty(weight_VD.shape if want_weight else (0,), dtype=_wide(weight_VD.dtype))


@torch.library.custom_op("factory_train::scaled", mutates_args=())
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x * scale in another type in one pass: no second copy of a head's gradient in between."""
    return torch.mul(x, scale.to(x.dtype), out=torch.empty_like(x, dtype=dtype))


@_scaled.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_ND, weight_VD = inputs[:2]
    _, grad_x_ND, grad_weight_VD = output
    ctx.save_for_backward(grad_x_ND, grad_weight_VD)
    ctx.wants, ctx.dtypes = inputs[-2:], (x_ND.dtype, weight_VD.dtype)
    ctx.mark_non_differentiable(grad_x_ND, grad_weight_VD)


def _backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = [
        _scaled(gradient, grad_loss, dtype) if want else None
        for gradient, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants, strict=True)
    ]
    return (*grads, None, None, None, None, None, None)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    x_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Returns the sum over tokens of -log softmax(x weightᵀ)[target], in nats, with a gradient by x and weight.

    The z-loss adds z_loss · log²Z a token, Z being the softmax's denominator (PaLM, arXiv 2204.02311, section 5).

    Args:
        x_ND: hidden states, in bfloat16, float32 or float64. Matmuls and logits are of this type; sums of at least float32.
        weight_VD: output head, of the same type or a wider one.
        targets_N: token ids, int64; `ignore_index` marks rows that do not count. Others must be below V.
        chunk_bytes: logits that may exist at once, in bytes; default: `CHUNK_BYTES` of the device.

    Returns:
        A scalar in at least float32.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        x_ND = x_ND.to(torch.get_autocast_dtype(x_ND.device.type))
    grad = torch.is_grad_enabled()
    chunk_bytes = chunk_bytes or CHUNK_BYTES.get(x_ND.device.type, CHUNK_BYTES["cuda"])
    loss, _, _ = _linear_cross_entropy(
        x_ND.contiguous(),
        weight_VD,
        targets_N.contiguous(),
        ignore_index,
        z_loss,
        chunk_bytes,
        grad and x_ND.requires_grad,
        grad and weight_VD.requires_grad,
    )
    return loss
