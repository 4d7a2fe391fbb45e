"""Muon: its elementwise passes and its iteration, against torch's own optimizer.

    python -m benchmarks.kernel_sections.muon

Times were never measured by the authors on a card so far; without one only the correctness part runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernel_sections.timing import compare, print_section
from factory_train.kernels import muon

# Matrices of a layer of Llama 3.2 1B and of Llama 3.1 8B, and how many there are in a bank here.
SHAPES = {"1B": [(16, 2048, 2048), (16, 8192, 2048), (16, 512, 2048)], "8B": [(4, 4096, 4096), (4, 14336, 4096), (4, 1024, 4096)]}
STEPS = 5


def correctness(device: str) -> list[dict[str, Any]]:
    """Compares with float64 on fresh random inputs; each row says whether it is ok."""
    run = torch.zeros((), device=device)
    one = torch.ones((), dtype=torch.float64, device=device)
    rows = []
    kernel_runs_here = device != "cpu" or type(getattr(muon, "momentum_pass", None)).__name__ == "InterpretedFunction"
    momentum_pass, apply_pass = (
        (muon.launch_momentum, muon.launch_apply) if kernel_runs_here else (muon.reference_momentum, muon.reference_apply)
    )
    for n in (1, 255, 4097, 100_003, *([2**31 + 4096] if device != "cpu" else [])):
        dtype = torch.float32 if n < 2**31 else torch.bfloat16
        weight, grad, momentum = (torch.randn(n, device=device, dtype=dtype) for _ in range(3))
        # The end tells of offsets as well as the whole, and a float64 copy of 2^31 elements would not fit.
        tail = slice(max(0, n - 100_003), n)
        w, g, m = (tensor[tail].double() for tensor in (weight, grad, momentum))
        update = torch.full((n,), float("nan"), device=device, dtype=torch.bfloat16)
        momentum_pass(momentum, grad, update, one, run, 0.95)
        apply_pass(weight, update, run, 0.99, 0.01)
        m = 0.95 * m + 0.05 * g
        expected = {"momentum": m, "update": 0.05 * g + 0.95 * m, "weight": 0.99 * w - 0.01 * update[tail].double()}
        for name, found in {"momentum": momentum, "update": update, "weight": weight}.items():
            error = float((found[tail].double() - expected[name]).abs().max())
            rows.append({"op": f"muon {name}", "n": n, "error": error, "ok": error <= (1e-5 if found.dtype == torch.float32 else 4e-2)})
        del weight, grad, momentum, update
    # Not smaller: a single value in bf16 may land anywhere in the iteration's band of 0.84 to 1.13.
    for shape in ((3, 33, 65), (2, 300, 100)):
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 6e-2)):
            x = torch.randn(shape, device=device).to(dtype)
            exact = muon.orthogonalize(x.double(), STEPS)
            error = float((muon.orthogonalize(x, STEPS).double() - exact).norm() / exact.norm())
            rows.append({"op": "orthogonalize", "dtype": str(dtype), "shape": list(shape), "error": error, "ok": error <= tolerance})
    return rows


def times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    """Times the passes (GB/s of their floor) and the iteration in bf16 (TFLOP/s), batched and matrix by matrix."""
    rows = _pass_times(device, deadline_s / 5)
    for model, shapes in SHAPES.items():
        for shape in shapes:
            rows += _iteration_times(model, device, shape, deadline_s * 4 / 5 / sum(map(len, SHAPES.values())))
    return rows


def _pass_times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    n = 1 << 28
    weight, grad, momentum = (torch.randn(n, device=device) for _ in range(3))
    update = torch.empty(n, device=device, dtype=torch.bfloat16)
    run, one = torch.zeros((), device=device), torch.ones((), dtype=torch.float64, device=device)
    calls: dict[str, Callable[[], Any]] = {
        "momentum": lambda: muon.launch_momentum(momentum, grad, update, one, run, 0.95),
        "momentum, plain torch": lambda: muon.reference_momentum(momentum, grad, update, one, run, 0.95),
        "apply": lambda: muon.launch_apply(weight, update, run, 0.99, 1e-3),
        "apply, plain torch": lambda: muon.reference_apply(weight, update, run, 0.99, 1e-3),
    }
    rows = []
    for name, found in compare(calls, deadline_s).items():
        row = {"op": "muon pass", "impl": name, "n": n, **found}
        if "ms_median" in found:
            row["gb_per_s"] = (14 if name.startswith("momentum") else 10) * n / found["ms_median"] / 1e6
        rows.append(row)
    return rows


def _iteration_times(model: str, device: str, shape: tuple[int, int, int], deadline_s: float) -> list[dict[str, Any]]:
    x = torch.randn(shape, device=device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], Any]] = {
        "ours, batched": lambda: muon.orthogonalize(x, STEPS),
        "ours, one by one": lambda: [muon.orthogonalize(matrix[None], STEPS) for matrix in x],
    }
    if hasattr(torch.optim, "Muon"):
        parameters = [torch.nn.Parameter(matrix.clone()) for matrix in x]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        calls["torch.optim.Muon, whole step"] = torch.optim.Muon(parameters).step
    side, other = min(shape[1:]), max(shape[1:])
    flops = 2 * STEPS * shape[0] * side * side * (2 * other + side)
    rows = []
    for name, found in compare(calls, deadline_s).items():
        row = {"op": "orthogonalize", "model": model, "impl": name, "shape": list(shape), **found}
        if "ms_median" in found:
            row["tflops_per_s"] = flops / found["ms_median"] / 1e9
        rows.append(row)
    return rows


if __name__ == "__main__":
    print_section(correctness, times)
