"""Loss and Muon on one CUDA card (`-m gpu`). Unverified by the authors: no card was at hand when they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gang import run_gang, start_run
from test_gpu import config, worst_difference
from test_training import rows, text_file  # noqa: F401 (a fixture)

from benchmarks.kernel_sections import loss, muon
from factory_train.kernels.loss import linear_cross_entropy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("section", [loss, muon])
def test_kernels_agree_with_float64(section) -> None:
    assert torch.cuda.is_available(), "this test needs a CUDA card"
    wrong = [row for row in section.correctness("cuda") if not row["ok"]]
    assert not wrong


def test_the_peak_does_not_grow_with_the_vocabulary() -> None:
    """Beyond head, its gradient and one chunk, a vocabulary four times as large takes no more."""
    extra = []
    for vocab_size in (32768, 131072):
        x = torch.randn(16384, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab_size, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(vocab_size, (16384,), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        linear_cross_entropy(x, weight, targets).backward()
        extra.append(torch.cuda.max_memory_allocated() - held - 3 * 4 * weight.numel())
        del x, weight, targets
    assert extra[1] <= extra[0] + (64 << 20)


@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_training_in_chunks_is_training(text_file: Path, tmp_path: Path, compute: str, tolerance: float) -> None:  # noqa: F811
    attempts = []
    for impl in ("plain", "chunked"):
        cfg = config(text_file, "cuda")
        cfg.precision.compute, cfg.train.loss_impl = compute, impl
        attempts.append(start_run(tmp_path, impl, cfg))
    run_gang([(attempt, 1) for attempt in attempts])
    assert worst_difference(rows(attempts[0]), rows(attempts[1])) <= tolerance


def test_muon_trains_as_on_the_cpu(text_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """Matmuls of the iteration are bf16 on the card and float32 on the CPU, so only roughly."""
    attempts = []
    for device in ("cpu", "cuda"):
        cfg = config(text_file, device)
        cfg.optim.name = "muon"
        attempts.append(start_run(tmp_path, device, cfg))
    run_gang([(attempt, 1) for attempt in attempts])
    assert worst_difference(rows(attempts[0]), rows(attempts[1])) <= 3e-2
