"""The optimizer step: statistics and AdamW in one pass, against torch's pipelines and the 8-bit optimizers of others.

    python -m benchmarks.kernel_sections.adamw

Times were never measured by the authors on a card so far; without one only the correctness part runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.kernel_sections.timing import compare, count_launches, host_microseconds, print_section
from factory_train.config import ModelConfig, from_mapping
from factory_train.fused_adamw import FusedAdamW
from factory_train.kernels import adamw, block_codes, gradient_statistics
from factory_train.kernels.split_float import join_float32, split_float32
from factory_train.models.llama import Llama

FORMATS = [(split, state) for split in (False, True) for state in ("float32", "bfloat16", "int8")]
# Bytes an element that a step has to move, statistics included, by master and state.
FLOORS = {("fp32", "fp32"): 32.0, ("split", "fp32"): 28.0, ("split", "bf16"): 20.0, ("split", "int8"): 16 + 16 / 256}
_TORCH_BYTES = 46.0
_LR, _BETA1, _BETA2, _EPS, _DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1
# Of the end of a large buffer this much is compared: a float64 copy of the whole would not fit.
_TAIL = 1 << 17


def correctness(device: str) -> list[dict[str, Any]]:
    """Compares with float64 on fresh random inputs; each row says whether it is ok.

    On a CPU the kernels run in Triton's interpreter if TRITON_INTERPRET=1 was set, and otherwise only their reference does.
    """
    kernel_runs_here = device != "cpu" or type(getattr(adamw, "adamw_buffer", None)).__name__ == "InterpretedFunction"
    rows = []
    for split, state in FORMATS:
        for n in (256, 1280, *_large(device, split, state)):
            for flat in (True, False):
                if n < 2**31 or flat:
                    rows.append(_one_step(device, split, state, n if flat else n - 77, flat, kernel_runs_here))
    rows += _skipped(device, kernel_runs_here)
    rows.append(_norm(device, kernel_runs_here))
    return rows


def _large(device: str, split: bool, state: str) -> list[int]:
    if device == "cpu":
        return [10_240]
    # Beyond 32 bits in the format that takes the least memory.
    return [1_024_000, *([2**31 + 4096] if split and state == "int8" else [])]


def _numbers(device: str) -> dict[str, torch.Tensor]:
    hyper = torch.tensor([[_LR, _BETA1, _BETA2, _EPS, _DECAY, 1.0]], dtype=torch.float64, device=device)
    return {
        "hyper": hyper,
        "control": torch.full((1, 8), float("nan"), device=device),
        "step": torch.full((1,), 9, dtype=torch.int64, device=device),
        "norm": torch.full((1,), float("nan"), dtype=torch.float64, device=device),
        "flag": torch.zeros(2, dtype=torch.int32, device=device),
    }


def _prepare(device: str, grads: list[torch.Tensor], kernel_runs_here: bool) -> dict[str, torch.Tensor]:
    numbers = _numbers(device)
    partials = torch.full((1024 if device != "cpu" else 3,), float("nan"), dtype=torch.float64, device=device)
    squares, prepare = (
        (gradient_statistics.launch_squares, gradient_statistics.launch_prepare)
        if kernel_runs_here
        else (gradient_statistics.reference_squares, gradient_statistics.reference_prepare)
    )
    squares(partials, grads)
    prepare(partials, torch.zeros((), device=device), *numbers.values())
    return numbers


def _one_step(device: str, split: bool, state: str, n: int, flat: bool, kernel_runs_here: bool) -> dict[str, Any]:
    tail = slice(max(0, n // 256 * 256 - _TAIL), n)
    grad = torch.randn(n, device=device, dtype=torch.bfloat16 if split else torch.float32)
    numbers = _prepare(device, [grad], kernel_runs_here)
    remainder = scale = scale_sq = None
    weight = torch.randn(n, device=device)
    if split:
        # Halves of their own making need not be those of a number.
        weight, remainder = split_float32(weight)
    if state == "int8":
        m = torch.randint(-127, 128, (n,), device=device, dtype=torch.int8)
        v = torch.randint(1, 256, (n,), device=device, dtype=torch.uint8)
        scale, scale_sq = (torch.rand(block_codes.num_blocks(n), device=device) + 0.1 for _ in range(2))
    else:
        kind = getattr(torch, state)
        m, v = 0.1 * torch.randn(n, device=device, dtype=kind), torch.rand(n, device=device, dtype=kind)

    def master() -> torch.Tensor:
        return weight[tail].double() if remainder is None else join_float32(weight[tail], remainder[tail]).double()

    def moments() -> tuple[torch.Tensor, torch.Tensor]:
        if scale is None or scale_sq is None:
            return m[tail].double(), v[tail].double()
        rows, length = slice(tail.start // 256, None), n - tail.start
        first = block_codes.decode_signed(block_codes.in_blocks(m[tail]), scale[rows])
        second = block_codes.decode_root(block_codes.in_blocks(v[tail]), scale_sq[rows])
        return first.view(-1)[:length].double(), second.view(-1)[:length].double()

    clip = min(1.0, 1.0 / float(numbers["norm"]))
    g, x, (m_before, v_before) = clip * grad[tail].double(), master(), moments()
    first, second = _BETA1 * m_before + (1 - _BETA1) * g, _BETA2 * v_before + (1 - _BETA2) * g * g
    root = (second / (1 - _BETA2**10)).sqrt() + _EPS
    way = _LR / (1 - _BETA1**10) * first / root
    exact = x * (1 - _LR * _DECAY) - way
    control, flag = numbers["control"], numbers["flag"]
    if flat:
        groups = torch.zeros(n // 256, dtype=torch.uint8, device=device)
        on_flat = adamw.launch_adamw_flat if kernel_runs_here else adamw.reference_adamw_flat
        on_flat(weight, remainder, grad, m, v, scale, scale_sq, groups, control, flag)
    else:
        on_list = adamw.launch_adamw_tensors if kernel_runs_here else adamw.reference_adamw_tensors
        coded = ([], []) if scale is None else ([scale], [scale_sq])
        groups = torch.zeros(1, dtype=torch.int32, device=device)
        on_list([weight], [] if remainder is None else [remainder], [grad], [m], [v], *coded, groups, control, flag)
    error = float(((master() - exact).abs() / (x.abs() + way.abs())).max())
    found = moments()
    loose = {"float32": 2e-6, "bfloat16": 2**-8, "int8": 2e-2}[state]
    state_error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, (first, second), strict=True))
    name = f"adamw {'split' if split else 'float32'} {state}"
    row = {"op": name, "layout": "flat" if flat else "list", "n": n, "error": error, "state_error": state_error}
    return row | {"ok": error <= 2e-6 and state_error <= loose}


def _skipped(device: str, kernel_runs_here: bool) -> Iterator[dict[str, Any]]:
    for poison in (float("nan"), float("inf")):
        grad = torch.randn(4096, device=device)
        grad[1234] = poison
        numbers = _prepare(device, [grad], kernel_runs_here)
        tensors = [torch.randn(4096, device=device) for _ in range(3)]
        before = [tensor.clone() for tensor in tensors]
        on_flat = adamw.launch_adamw_flat if kernel_runs_here else adamw.reference_adamw_flat
        groups = torch.zeros(16, dtype=torch.uint8, device=device)
        on_flat(tensors[0], None, grad, tensors[1], tensors[2], None, None, groups, numbers["control"], numbers["flag"])
        same = all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        yield {"op": f"adamw skip {poison}", "n": 4096, "ok": same and numbers["flag"].tolist() == [1, 1] and int(numbers["step"]) == 9}


def _norm(device: str, kernel_runs_here: bool) -> dict[str, Any]:
    grads = [torch.randn(n, device=device) for n in (1, 4095, 4097, 100_003)]
    exact = float(torch.cat(grads).double().norm())
    error = abs(float(_prepare(device, grads, kernel_runs_here)["norm"]) - exact) / exact
    return {"op": "norm of a list", "n": 4, "error": error, "ok": error <= 1e-6}


# Times


def shapes_of(model: str) -> list[torch.Size]:
    """Returns the shapes of the parameters of a preset."""
    path = Path(__file__).parents[2] / "configs" / "model" / f"{model}.yaml"
    cfg: ModelConfig = from_mapping(yaml.safe_load(path.read_text()), ModelConfig)
    with torch.device("meta"):
        return [parameter.shape for parameter in Llama(cfg, 128256).parameters()]


def times(device: str, deadline_s: float) -> list[dict[str, Any]]:
    """Times whole steps: norm, clipping, update, narrow weights. Each one in turns with torch's fused pipeline.

    Of 8B only every fourth parameter, for torch's pipeline and another do not fit a card together; and then all of it, one by one.
    """
    rows = []
    models = {
        "llama3_1b": shapes_of("llama3_1b"),
        "llama3_8b, a quarter": shapes_of("llama3_8b")[::4],
        "1000 x 1024": [torch.Size((1024,))] * 1000,
        "llama3_8b": shapes_of("llama3_8b"),
    }
    builders = _ours() | _others()
    for model, shapes in models.items():
        numel = sum(shape.numel() for shape in shapes)
        alone = model == "llama3_8b"
        baseline, baseline_error = (None, "") if alone else _built(lambda shapes=shapes: _torch_pipeline(shapes, device, fused=True))
        for name, (build, moved) in builders.items():
            candidate, error = _built(lambda build=build, shapes=shapes: build(shapes, device))
            calls = {key: call for key, call in {"torch fused + clip + cast": baseline, name: candidate}.items() if call is not None}
            found = compare(calls, deadline_s / len(models) / len(builders)) if candidate is not None else {name: {"error": error}}
            if baseline is None and not alone:
                found["torch fused + clip + cast"] = {"error": baseline_error}
            rows += [
                _row(model, impl, numel, facts, calls.get(impl), _TORCH_BYTES if impl != name else moved) for impl, facts in found.items()
            ]
            del candidate, calls
            torch.cuda.empty_cache()
        del baseline
        torch.cuda.empty_cache()
    return rows


def _built(build: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any] | None, str]:
    """Returns the call, or None and why there is none: a package that is not here, memory that is not enough."""
    try:
        return build(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}"


def _row(model: str, impl: str, numel: int, facts: dict[str, Any], call: Callable[[], Any] | None, moved: float) -> dict[str, Any]:
    row = {"op": "optimizer step", "model": model, "impl": impl, "n": numel, "bytes_an_element": moved, **facts}
    if "ms_median" in facts and call is not None:
        row["gb_per_s"] = moved * numel / facts["ms_median"] / 1e6
        row["launches"], row["host_us"] = count_launches(call), host_microseconds(call)
    return row


def _parameters(shapes: list[torch.Size], device: str, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    parameters = [torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def _torch_pipeline(shapes: list[torch.Size], device: str, fused: bool) -> Callable[[], Any]:
    """Float32 masters: clip, step, and the bfloat16 weights that the forward pass works with."""
    masters = _parameters(shapes, device, torch.float32)
    weights = [master.detach().bfloat16() for master in masters]
    optimizer = torch.optim.AdamW(masters, fused=fused, foreach=not fused)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        optimizer.step()
        torch._foreach_copy_(weights, [master.detach() for master in masters])

    return step


def _ours() -> dict[str, tuple[Callable[..., Callable[[], Any]], float]]:
    def builder(master: str, state: str, flat: bool, graph: bool = False) -> Callable[..., Callable[[], Any]]:
        def build(shapes: list[torch.Size], device: str) -> Callable[[], Any]:
            parameters = _parameters(shapes, device, torch.bfloat16 if master == "split" else torch.float32)
            optimizer = FusedAdamW(parameters, max_grad_norm=1.0, state=state, master=master, flat_gradients=flat)
            if flat:
                assert optimizer._flat_grad is not None
                optimizer._flat_grad.normal_()
            return _captured(optimizer) if graph else optimizer.step

        return build

    found = {}
    for (master, state), moved in FLOORS.items():
        for flat in (True, False):
            found[f"ours {master}+{state} {'flat' if flat else 'table'}"] = builder(master, state, flat), moved
    found["ours split+int8 flat, CUDA graph"] = builder("split", "int8", True, graph=True), FLOORS["split", "int8"]
    return found


def _captured(optimizer: FusedAdamW) -> Callable[[], Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def _others() -> dict[str, tuple[Callable[..., Callable[[], Any]], float]]:
    def of_package(module: str, name: str, **settings: Any) -> Callable[..., Callable[[], Any]]:
        def build(shapes: list[torch.Size], device: str) -> Callable[[], Any]:
            make = getattr(importlib.import_module(module), name)
            parameters = _parameters(shapes, device, torch.bfloat16)
            optimizer = make(parameters, lr=1e-3, **settings)

            def step() -> None:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
                optimizer.step()

            return step

        return build

    def plain(shapes: list[torch.Size], device: str) -> Callable[[], Any]:
        parameters = _parameters(shapes, device, torch.bfloat16)
        optimizer = torch.optim.AdamW(parameters, fused=True)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()

        return step

    return {
        "torch fused + clip + cast, alone": (lambda shapes, device: _torch_pipeline(shapes, device, fused=True), _TORCH_BYTES),
        "torch foreach + clip + cast": (lambda shapes, device: _torch_pipeline(shapes, device, fused=False), _TORCH_BYTES),
        # Weights and moments in bfloat16, no master: fewer digits than all others.
        "torch fused, all bfloat16": (plain, 20.0),
        "flashoptim": (of_package("flashoptim", "FlashAdamW"), 20.0),
        "torchao 8-bit": (of_package("torchao.optim", "AdamW8bit", bf16_stochastic_round=True), 16.0),
        "bitsandbytes 8-bit": (of_package("bitsandbytes.optim", "AdamW8bit"), 16.0),
    }


if __name__ == "__main__":
    print_section(correctness, times)
