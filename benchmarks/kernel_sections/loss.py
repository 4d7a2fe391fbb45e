"""The loss: chunked linear cross-entropy against torch's ways and Liger's.

    python -m benchmarks.kernel_sections.loss

Times were never measured by the authors on a card so far; without one only the correctness part runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernel_sections.timing import compare, print_section
from factory_train.kernels import loss as kernel

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def correctness(device: str) -> list[dict[str, Any]]:
    """Compares loss and gradients with float64 on fresh random inputs; each row says whether it is ok.

    On a CPU the row kernel runs in Triton's interpreter if TRITON_INTERPRET=1 was set, and the operator takes its reference.
    """
    rows = []
    kernel_runs_here = device != "cpu" or type(getattr(kernel, "cross_entropy_rows", None)).__name__ == "InterpretedFunction"
    large = [(4096, 512, 50257), (2048, 1024, 131072)] if device != "cpu" else []
    for dtype, tolerance in _TOLERANCE.items():
        for num_tokens, dim, vocab_size in [(1, 8, 1), (37, 16, 101), (255, 32, 1000), *large]:
            x = torch.randn(num_tokens, dim, device=device).to(dtype).requires_grad_()
            weight = (torch.randn(vocab_size, dim, device=device) / dim**0.5).to(dtype).requires_grad_()
            targets = torch.randint(vocab_size, (num_tokens,), device=device)
            targets[1::7] = kernel.IGNORE_INDEX
            wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
            expected = F.cross_entropy(F.linear(*wide), targets, ignore_index=kernel.IGNORE_INDEX, reduction="sum")
            found = kernel.linear_cross_entropy(x, weight, targets, chunk_bytes=max(1, num_tokens // 3) * vocab_size * x.element_size())
            error = float(((found.double() - expected).abs() / expected.abs().clamp(min=1e-9)).detach())
            for a, b in zip(torch.autograd.grad(found, (x, weight)), torch.autograd.grad(expected, wide), strict=True):
                error = max(error, float((a.double() - b).norm() / b.norm().clamp(min=1e-9)))
            row = {"op": "linear_cross_entropy", "dtype": str(dtype), "shape": [num_tokens, dim, vocab_size], "error": error}
            rows.append(row | {"ok": error <= tolerance})
            if kernel_runs_here and num_tokens * vocab_size < 10**6:
                rows.append(_row_kernel(device, dtype, num_tokens, vocab_size, tolerance))
    if device != "cpu":
        rows.append(_beyond_int32(device))
    return rows


def _row_kernel(device: str, dtype: torch.dtype, num_tokens: int, vocab_size: int, tolerance: float) -> dict[str, Any]:
    logits = torch.randn(num_tokens, vocab_size, device=device).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    expected = logits.clone()
    losses = kernel.reference_cross_entropy(expected, targets, kernel.IGNORE_INDEX, 1e-3, True)
    found = kernel.launch_cross_entropy(logits, targets, kernel.IGNORE_INDEX, 1e-3, True)
    error = max(float((found - losses).abs().max()), float((logits.float() - expected.float()).abs().max()))
    row = {"op": "cross_entropy_rows", "dtype": str(dtype), "shape": [num_tokens, vocab_size], "error": error}
    return row | {"ok": error <= tolerance}


def _beyond_int32(device: str) -> dict[str, Any]:
    """More than 2^31 logits at once; the last row is the one a 32-bit offset would miss."""
    rows, vocab_size = 16500, 131072
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=device)
    targets = torch.zeros(rows, dtype=torch.int64, device=device)
    losses = kernel.launch_cross_entropy(logits, targets, kernel.IGNORE_INDEX, 0.0, True)
    error = float((losses - torch.log(torch.tensor(float(vocab_size), device=device))).abs().max())
    last = float(logits[-1, 0].float() + 1.0)
    return {"op": "cross_entropy_rows", "shape": [rows, vocab_size], "error": error, "ok": error < 1e-4 and abs(last) < 1e-2}


def times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    """Times forward and backward in bf16 of the row kernel alone and of head and loss together."""
    rows = _row_times(device, deadline_s / 4)
    shapes = [(16384, 2048, 128256), (8192, 4096, 128256)]
    for shape in shapes:
        rows += _linear_times(device, shape, deadline_s * 3 / 4 / len(shapes))
    return rows


def _row_times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    num_tokens, vocab_size = 8192, 131072
    logits = torch.randn(num_tokens, vocab_size, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocab_size, (num_tokens,), device=device)
    leaf = logits.clone().requires_grad_()
    calls: dict[str, Callable[[], Any]] = {
        # In place: later calls work on gradients instead of logits, which takes as long.
        "ours": lambda: kernel.launch_cross_entropy(logits, targets, kernel.IGNORE_INDEX, 0.0, True),
        "torch": lambda: torch.autograd.grad(F.cross_entropy(leaf, targets, reduction="sum"), leaf),
    }
    rows = []
    for name, found in compare(calls, deadline_s).items():
        row = {"op": "cross_entropy", "impl": name, "shape": [num_tokens, vocab_size], **found}
        if "ms_median" in found:
            row["gb_per_s"] = 6 * num_tokens * vocab_size / found["ms_median"] / 1e6
        rows.append(row)
    return rows


def _linear_times(device: str, shape: tuple[int, int, int], deadline_s: float) -> list[dict[str, Any]]:
    num_tokens, dim, vocab_size = shape
    x = torch.randn(num_tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(vocab_size, dim, device=device) / dim**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,), device=device)

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    def gradients(loss: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(), (x, weight))

    calls = {
        "ours": gradients(lambda: kernel.linear_cross_entropy(x, weight, targets)),
        "torch": gradients(plain),
        "torch.compile": gradients(torch.compile(plain)),
    }
    if hasattr(F, "linear_cross_entropy"):
        calls["torch linear_cross_entropy"] = gradients(lambda: F.linear_cross_entropy(x, weight, targets, reduction="sum"))
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        calls["liger"] = gradients(lambda: LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)[0])
    flops = 6 * num_tokens * dim * vocab_size
    rows = []
    for name, found in compare(calls, deadline_s).items():
        row = {"op": "linear_cross_entropy", "impl": name, "shape": list(shape), **found}
        if "ms_median" in found:
            row["tflops_per_s"] = flops / found["ms_median"] / 1e9
        rows.append(row)
    return rows


if __name__ == "__main__":
    print_section(correctness, times)
