"""DiLoCo's outer step: each pass, and the whole of it beside torchft's sequence of operators, at a billion local parameters.

    python -m benchmarks.kernel_sections.pseudogradient

`ms_median` is the time on the card, `host_us` how long training's thread is held up. Both sides get the mean of the islands for nothing:
ours as codes in pinned host memory, where the exchange leaves them, torchft's as its own pseudo-gradient on the card.

Times were never measured by the authors on a card so far; without one only the correctness part runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.kernel_sections.adamw import shapes_of
from benchmarks.kernel_sections.timing import compare, count_launches, host_microseconds, print_section
from factory_train.distributed.outer_state import OuterState
from factory_train.kernels import pseudogradient as kernels
from factory_train.kernels import pseudogradient_reference as reference

FORMATS = ("fp32", "bf16", "int8", "int4")
MODEL = "llama3_1b"
# Of a flat fragment.
ELEMENTS = 2**30
_LR, _MOMENTUM, _KEEP = 0.7, 0.9, 0.5


def correctness(device: str) -> list[dict[str, Any]]:
    """Compares codes, state and fingerprints with the reference's, bit for bit; each row says whether it is ok.

    On a CPU the kernels run in Triton's interpreter if TRITON_INTERPRET=1 was set, and otherwise only their reference does.
    """
    kernel_runs_here = device != "cpu" or type(getattr(kernels, "encode_pass", None)).__name__ == "InterpretedFunction"
    rows = []
    for format in FORMATS if kernel_runs_here else ():
        # Beyond 32 bits in one format.
        for n in (1, 300, 10_243) if device == "cpu" else (300, 1_000_003, *([2**31 + 4099] if format == "int8" else [])):
            rows.append(_passes(device, format, n))
    return rows


def room(n: int, format: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns empty codes and scales."""
    blocks = kernels.num_blocks(n)
    scales = blocks if kernels.has_scales(format) else 0
    return torch.empty(blocks * kernels.CODE_BYTES[format], dtype=torch.uint8, device=device), torch.empty(scales, device=device)


def _passes(device: str, format: str, n: int) -> dict[str, Any]:
    """All passes one after the other; what is compared are the last blocks."""
    first = max(0, kernels.num_blocks(n) - 512)
    at, some = slice(first * kernels.BLOCK, None), slice(first * kernels.CODE_BYTES[format], None)
    outer, inner, error, left_out = (torch.randn(n, device=device) for _ in range(4))
    ends = [tensor[at].clone() for tensor in (outer, inner, error)]
    (codes, scales), (end_codes, end_scales) = room(n, format, device), room(ends[0].numel(), format, device)
    squares, end_squares = (torch.empty(kernels.num_blocks(tensor.numel()), device=device) for tensor in (outer, ends[0]))
    end_left_out = torch.empty_like(ends[0])
    kernels.launch_encode(outer, inner, error, codes, scales, left_out, squares, format)
    reference.encode(*ends, end_codes, end_scales, end_left_out, end_squares, format)
    same = [torch.equal(codes[some], end_codes), torch.equal(left_out[at], end_left_out)]
    same.append(torch.equal(scales[first:] if kernels.has_scales(format) else scales, end_scales))
    # What was left out serves as momentum.
    momentum, end_state = left_out, [ends[0], end_left_out, ends[1]]
    prints, end_prints = (torch.empty(tensor.numel(), dtype=torch.int64, device=device) for tensor in (squares, end_squares))
    kernels.launch_outer_update(codes, scales, outer, momentum, inner, prints, _LR, _MOMENTUM, _KEEP, format)
    reference.outer_update(end_codes, end_scales, *end_state, end_prints, _LR, _MOMENTUM, _KEEP, format, first)
    same += [torch.equal(a[at], b) for a, b in zip((outer, momentum, inner), end_state, strict=True)]
    same += [torch.equal(prints[first:], end_prints), torch.equal(kernels.launch_fingerprint(outer, momentum), prints)]
    # Two members that sent the same.
    sent = torch.stack((end_codes, end_codes)), torch.stack((end_scales, end_scales))
    weights = torch.tensor([0.25, 0.75], device=device)
    ours, theirs = (room(ends[0].numel(), format, device) for _ in range(2))
    kernels.launch_reduce(*sent, weights, *ours, format)
    reference.reduce(*sent, weights, *theirs, format)
    same += [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    return {"op": "pseudogradient", "format": format, "n": n, "ok": all(same)}


def times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    """Times passes on a flat fragment, and the whole outer step on the parameters of a model, ours and torchft's in turns."""
    rows = _pass_times(device, deadline_s / 2)
    shapes = shapes_of(MODEL)
    numel = sum(shape.numel() for shape in shapes)
    torchft, (state, update) = _torchft(shapes, device), _ours(shapes, device)
    calls = {"ours int8": update, "torchft's operators": torchft}
    for name, found in compare(calls, deadline_s / 4).items():
        row = {"op": "outer step", "model": MODEL, "impl": name, "n": numel, **found}
        if "ms_median" in found:
            row |= {"launches": count_launches(calls[name]), "host_us": host_microseconds(calls[name])}
        rows.append(row)
    rows.append(
        {"op": "fingerprint", "model": MODEL, "n": numel, **compare({"ours": lambda: state.fingerprint(0)}, deadline_s / 8)["ours"]}
    )
    return rows


def _pass_times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    n = ELEMENTS
    outer, inner, error, left_out, momentum = (torch.randn(n, device=device) * 0.02 for _ in range(5))
    squares = torch.empty(kernels.num_blocks(n), device=device)
    prints = torch.empty(kernels.num_blocks(n), dtype=torch.int64, device=device)
    weights, rows = torch.tensor([0.5, 0.5], device=device), []
    for format in FORMATS:
        codes, scales = room(n, format, device)
        half = room(n // 2, format, device)
        sent = codes.view(2, -1), scales.view(2, -1)
        code_bytes = kernels.CODE_BYTES[format] / kernels.BLOCK + 4 / kernels.BLOCK * kernels.has_scales(format)
        feedback = (error, left_out) if format != "fp32" else (error[:0], left_out[:0])
        calls: dict[str, tuple[Callable[[], Any], float]] = {
            "encode": (
                partial(kernels.launch_encode, outer, inner, feedback[0], codes, scales, feedback[1], squares, format),
                (16.0 if format != "fp32" else 8.0) + code_bytes,
            ),
            "reduce": (partial(kernels.launch_reduce, *sent, weights, *half, format), 1.5 * code_bytes),
            "outer_update": (
                partial(kernels.launch_outer_update, codes, scales, outer, momentum, inner, prints, _LR, _MOMENTUM, _KEEP, format),
                24.0 + code_bytes,
            ),
        }
        if format == "int8":
            calls["fingerprint"] = (partial(kernels.launch_fingerprint, outer, momentum), 8.0)
        found = compare({name: call for name, (call, _) in calls.items()}, deadline_s / len(FORMATS))
        for name, facts in found.items():
            row = {"op": name, "format": format, "n": n, "bytes_an_element": calls[name][1], **facts}
            if "ms_median" in facts:
                row["gb_per_s"] = calls[name][1] * n / facts["ms_median"] / 1e6
            rows.append(row)
        del codes, scales, half, sent, calls
        torch.cuda.empty_cache()
    return rows


def _parameters(shapes: list[torch.Size], device: str) -> dict[str, torch.Tensor]:
    return {str(index): torch.randn(shape, device=device) * 0.02 for index, shape in enumerate(shapes)}


def _ours(shapes: list[torch.Size], device: str) -> tuple[OuterState, Callable[[], None]]:
    """Encode, and take the outer step with the codes of the island itself; the round itself is not part of it."""
    parameters = _parameters(shapes, device)
    state = OuterState(parameters, [list(parameters)], "int8", error_feedback=True)

    def step() -> None:
        encoded = state.encode(0)
        state.apply(0, encoded.codes, encoded.scales, lr=_LR, momentum=_MOMENTUM, keep=_KEEP)
        state.accept(0, encoded)

    return state, step


def _torchft(shapes: list[torch.Size], device: str) -> Callable[[], None]:
    """What torchft's DiLoCo does with each parameter around its all-reduce (release 2026.10.26): backups in pinned host memory."""
    parameters = [torch.nn.Parameter(value) for value in _parameters(shapes, device).values()]
    backups = [torch.empty(shape, pin_memory=True).copy_(parameter.detach()) for shape, parameter in zip(shapes, parameters, strict=True)]
    optimizer = torch.optim.SGD(parameters, lr=_LR, momentum=_MOMENTUM, nesterov=True)

    @torch.no_grad()
    def step() -> None:
        gradients = [backup.to(device) - parameter for backup, parameter in zip(backups, parameters, strict=True)]
        for gradient in gradients:
            gradient.div_(2)
        local = [parameter.clone() for parameter in parameters]
        for parameter, backup in zip(parameters, backups, strict=True):
            parameter.copy_(backup)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        for parameter, backup, mine in zip(parameters, backups, local, strict=True):
            backup.copy_(parameter, non_blocking=True)
            parameter.lerp_(mine, _KEEP)
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    print_section(correctness, times)
