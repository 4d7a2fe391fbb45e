"""The same training on CUDA: one card (`-m gpu`) and several (`-m multigpu`). Neither needs Hydra, MLflow or a launcher.

python -m pytest -m gpu
python -m pytest -m multigpu      # unverified by the authors: no machine with several cards was at hand
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from gang import run_gang, start_run
from test_training import rows, small_config, text_file  # noqa: F401 (a fixture)

from factory_train.config import Config
from factory_train.diagnostics.out_of_memory import is_out_of_memory
from factory_train.diagnostics.sync_check import SyncCheck
from factory_train.run_dir import RunDir

STEPS = 20


def config(text: Path, device: str, strategy: str = "fsdp", world: int = 1, *, steps: int = STEPS) -> Config:
    cfg = small_config(text, "single")
    cfg.model.dim, cfg.model.num_heads, cfg.model.num_kv_heads, cfg.model.ffn_dim = 64, 4, 2, 128
    cfg.hardware.device = device
    cfg.train.steps = steps
    cfg.train.deterministic = True
    cfg.optim.schedule = "constant"
    # Copies to the host on a side stream, while training goes on.
    cfg.checkpoint.every_steps = 5
    cfg.parallel.strategy = strategy
    cfg.parallel.dp_replicate, cfg.parallel.dp_shard = (world, 1) if strategy == "ddp" else (1, world)
    cfg.launcher.tasks_per_node = world
    return cfg


@pytest.fixture(scope="module")
def on_cpu(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:  # noqa: F811
    attempt = start_run(tmp_path_factory.mktemp("cpu"), "cpu", config(text_file, "cpu"))
    run_gang([(attempt, 1)])
    return rows(attempt)


def worst_difference(a: list[dict], b: list[dict]) -> float:
    return max(abs(x["loss"] - y["loss"]) / x["loss"] for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("compute", "compiled", "tolerance"), [("float32", False, 1e-4), ("bfloat16", False, 2e-2), ("bfloat16", True, 2e-2)]
)
def test_one_card_trains_as_the_cpu_does(
    text_file: Path,  # noqa: F811
    tmp_path: Path,
    on_cpu: list[dict],
    compute: str,
    compiled: bool,
    tolerance: float,
) -> None:
    assert torch.cuda.is_available(), "this test needs a CUDA card"
    cfg = config(text_file, "cuda")
    cfg.precision.compute, cfg.parallel.compile = compute, compiled
    attempt = start_run(tmp_path, "card", cfg)
    run_gang([(attempt, 1)])
    found = rows(attempt)
    worst = worst_difference(on_cpu, found)
    print(f"{compute} compile={compiled}: largest relative difference to CPU {worst:.2e}")
    assert [row["data_hash"] for row in found] == [row["data_hash"] for row in on_cpu]
    assert worst <= tolerance


@pytest.mark.gpu
def test_a_run_on_one_card_resumes_bit_identically_and_on_the_cpu_too(text_file: Path, tmp_path: Path) -> None:  # noqa: F811
    half = STEPS // 2
    whole = start_run(tmp_path, "whole", config(text_file, "cuda"))
    first = start_run(tmp_path, "parts", config(text_file, "cuda", steps=half))
    run_gang([(whole, 1), (first, 1)])
    second = start_run(tmp_path, "parts", config(text_file, "cuda"))
    run_gang([(second, 1)])
    resumed = rows(second)
    assert [(row["step"], row["loss"]) for row in resumed] == [(row["step"], row["loss"]) for row in rows(whole)]
    third = start_run(tmp_path, "parts", config(text_file, "cpu", steps=STEPS + 4))
    run_gang([(third, 1)])
    assert rows(third)[-1]["step"] == STEPS + 4
    assert math.isfinite(rows(third)[-1]["loss"])


@pytest.mark.multigpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_cards_train_as_the_cpu_does_and_resume_on_one(
    text_file: Path,  # noqa: F811
    tmp_path: Path,
    on_cpu: list[dict],
    strategy: str,
) -> None:
    assert torch.cuda.device_count() >= 2, "this test needs two CUDA cards"
    attempt = start_run(tmp_path, strategy, config(text_file, "cuda", strategy, 2))
    run_gang([(attempt, 2)])
    assert worst_difference(on_cpu, rows(attempt)) <= 1e-4
    longer = start_run(tmp_path, strategy, config(text_file, "cuda", steps=STEPS + 4))
    run_gang([(longer, 1)])
    assert RunDir.open(longer.run.path).metrics()[-1]["step"] == STEPS + 4


@pytest.mark.gpu
def test_a_profiled_step_on_one_card_has_kernels_a_breakdown_and_a_memory_snapshot(text_file: Path, tmp_path: Path) -> None:  # noqa: F811
    """Unverified by the authors: no card was at hand when it was written."""
    cfg = config(text_file, "cuda")
    cfg.profile.steps, cfg.profile.memory = "10:12", True
    attempt = start_run(tmp_path, "profiled", cfg)
    run_gang([(attempt, 1)])
    with gzip.open(attempt.path / "profile/rank-00000-steps-10-12.json.gz") as file:
        categories = {event.get("cat") for event in json.load(file)["traceEvents"]}
    assert {"kernel", "user_annotation"} <= categories
    assert (attempt.path / "profile/rank-00000-steps-10-12.memory.pickle").stat().st_size > 0
    found = rows(attempt)
    assert all(row["compute_s"] > 0 and row["reduce_s"] > 0 and row["data_s"] >= 0 for row in found)
    assert all(row["optimizer_s"] > 0 for row in found[1:])
    # The trainer itself never makes the host wait.
    assert [event for event in attempt.events() if event["event"] == "host-sync"] == []


@pytest.mark.gpu
def test_code_that_makes_the_host_wait_is_named() -> None:
    """Unverified by the authors: no card was at hand when it was written."""
    events: list[dict] = []
    check = SyncCheck(torch.device("cuda"), lambda kind, **facts: events.append(facts))
    tensor = torch.ones(4, device="cuda")
    for step in range(1, 12):
        check.before_step()
        tensor.sum().item()
        check.after_step(step)
    assert torch.cuda.get_sync_debug_mode() == 0
    (event,) = events
    assert event["places"][0].startswith(f"{__file__}:")


@pytest.mark.gpu
def test_running_out_of_the_cards_memory_is_recognised() -> None:
    """Unverified by the authors: no card was at hand when it was written."""
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(10**15, device="cuda")
    assert is_out_of_memory(caught.value)
