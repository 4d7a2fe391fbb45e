"""AdamW's kernels and optim=adamw_fused on one CUDA card (`-m gpu`).

Unverified by the authors: no card was at hand when they were written.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gang import run_gang, start_run
from test_gpu import config, worst_difference
from test_training import rows, text_file  # noqa: F401 (a fixture)

from benchmarks.kernel_sections import adamw as section
from benchmarks.kernel_sections.timing import count_launches
from factory_train.fused_adamw import FusedAdamW
from factory_train.kernels import adamw, block_codes

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 1024), (1000, 333), (7,), (2048,)]


def parameters(dtype: torch.dtype, device: str = "cuda") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in SHAPES:
        made.append(torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)))
        made[-1].grad = torch.randn(shape, generator=generator).to(device, dtype)
    return made


def test_kernels_agree_with_float64() -> None:
    assert torch.cuda.is_available(), "this test needs a CUDA card"
    wrong = [row for row in section.correctness("cuda") if not row["ok"]]
    assert not wrong


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("master", ["fp32", "split"])
@pytest.mark.parametrize("flat", [False, True])
def test_steps_on_the_card_are_those_of_the_cpu(state: str, master: str, flat: bool) -> None:
    """Rounding is that of IEEE in both, without fused multiply-add; codes may differ by one where a root lies between two."""
    dtype = torch.bfloat16 if master == "split" else torch.float32
    found = []
    for device in ("cpu", "cuda"):
        mine = parameters(dtype, device)
        grads = [parameter.grad.clone() for parameter in mine]
        optimizer = FusedAdamW(mine, max_grad_norm=1.0, state=state, master=master, flat_gradients=flat)
        for step in range(3):
            for parameter, grad in zip(mine, grads, strict=True):
                if flat:
                    parameter.grad.copy_(grad / (1 + step))
                else:
                    parameter.grad = grad / (1 + step)
            optimizer.step()
        found.append([optimizer.master(parameter).detach().cpu() for parameter in mine])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-7 if state != "int8" else 1e-4)


def test_split_weights_hold_the_bit_identical_float32_master() -> None:
    narrow = parameters(torch.bfloat16)
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in narrow]
    for a, b in zip(wide, narrow, strict=True):
        a.grad = b.grad.float()
    optimizers = FusedAdamW(wide), FusedAdamW(narrow, master="split")
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(wide, narrow, strict=True):
        assert torch.equal(optimizers[1].master(b).detach(), a)


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_a_step_is_three_launches_never_waits_and_is_captured_in_a_graph(state: str) -> None:
    captured, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    settings = {"state": state, "master": "split", "max_grad_norm": 1.0, "flat_gradients": True}
    optimizers = FusedAdamW(captured, **settings), FusedAdamW(plain, **settings)
    for mine in (captured, plain):
        for parameter, like in zip(mine, parameters(torch.bfloat16), strict=True):
            parameter.grad.copy_(like.grad)
    replay = section._captured(optimizers[0])
    for _ in range(3):
        optimizers[1].step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            replay()
            optimizers[1].step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count_launches(optimizers[1].step) == 3
    replay()
    assert [optimizer.step_count() for optimizer in optimizers] == [6, 6]
    for a, b in zip(captured, plain, strict=True):
        assert torch.equal(optimizers[0].master(a).detach(), optimizers[1].master(b).detach())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    mine = parameters(torch.bfloat16)
    optimizer = FusedAdamW(mine, state="int8", master="split", max_grad_norm=1.0)
    optimizer.step()
    before = [optimizer.master(parameter).detach() for parameter in mine]
    mine[2].grad[3] = float("inf")
    optimizer.step()
    assert all(torch.equal(optimizer.master(parameter).detach(), old) for parameter, old in zip(mine, before, strict=True))
    assert (optimizer.step_count(), int(optimizer.skipped)) == (1, 1)


def test_codes_on_the_card_survive_being_decoded() -> None:
    """The kernel's own codes come back from float32 as they were: a checkpoint may take either."""
    mine = parameters(torch.float32)
    optimizer = FusedAdamW(mine, state="int8")
    for _ in range(3):
        optimizer.step()
    for parameter in mine:
        slot = optimizer.slot(parameter)
        codes = slot.exp_avg.clone(), slot.exp_avg_sq.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            slot.moment(key).copy_(slot.moment(key).detach())
        assert torch.equal(slot.exp_avg, codes[0])
        assert torch.equal(slot.exp_avg_sq, codes[1])


def test_more_than_two_billion_elements_in_one_buffer() -> None:
    n = 2**31 + 4096
    weight, grad = (torch.zeros(n, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight[-1], grad[-1] = 1.0, 1.0
    remainder = torch.zeros(n, dtype=torch.int16, device="cuda")
    m, v = torch.zeros(n, dtype=torch.int8, device="cuda"), torch.zeros(n, dtype=torch.uint8, device="cuda")
    scale, scale_sq = (torch.zeros(block_codes.num_blocks(n), device="cuda") for _ in range(2))
    control = torch.tensor([[1.0, 0.1, 1.0, 1e-8, 0.5, 0.5, 1.0, 0.0]], device="cuda")
    groups, flag = torch.zeros(n // 256, dtype=torch.uint8, device="cuda"), torch.zeros(2, dtype=torch.int32, device="cuda")
    adamw.launch_adamw_flat(weight, remainder, grad, m, v, scale, scale_sq, groups, control, flag)
    assert m[-1] == 127
    assert not m[:-1].any()
    assert float(weight[-1]) < 0.95


@pytest.mark.parametrize(("state", "master", "tolerance"), [("fp32", "fp32", 1e-4), ("int8", "split", 2e-2)])
def test_training_is_that_of_torchs_adamw(text_file: Path, tmp_path: Path, state: str, master: str, tolerance: float) -> None:  # noqa: F811
    attempts = []
    for name in ("adamw", "adamw_fused"):
        cfg = config(text_file, "cuda")
        cfg.optim.name = name
        cfg.precision.compute = "bfloat16" if master == "split" else "float32"
        if name == "adamw_fused":
            cfg.optim.state, cfg.optim.master = state, master
        attempts.append(start_run(tmp_path, name, cfg))
    run_gang([(attempt, 1) for attempt in attempts])
    assert worst_difference(rows(attempts[0]), rows(attempts[1])) <= tolerance
