"""Every way of spreading a run over ranks is the same run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from gang import run_gang, start_run

from factory_train.config import Config
from factory_train.run_dir import Attempt

STEPS = 20

# name: (strategy, world, dp_replicate, dp_shard, micro_batch_size)
LAYOUTS = {
    "single": ("single", 1, 1, 1, 8),
    "accumulated": ("single", 1, 1, 1, 1),
    "ddp2": ("ddp", 2, 2, 1, 4),
    "fsdp2": ("fsdp", 2, 1, 2, 2),
    "fsdp4": ("fsdp", 4, 1, 4, 2),
    "hsdp2x2": ("fsdp", 4, 2, 2, 1),
    "padded3": ("ddp", 3, 3, 1, 2),
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(subprocess.__file__).read_text())
    return path


def small_config(text_file: Path, layout: str, precision: str = "float32") -> Config:
    """Returns a run of 20 steps on a model whose sizes do not divide evenly, so that shards are uneven."""
    strategy, world, dp_replicate, dp_shard, micro = LAYOUTS[layout]
    cfg = Config(recipe="claim")
    cfg.data.name, cfg.data.path, cfg.data.tokenizer = "text", str(text_file), "byte"
    cfg.model.dim, cfg.model.num_layers, cfg.model.num_heads, cfg.model.num_kv_heads, cfg.model.ffn_dim = 36, 2, 6, 3, 70
    cfg.train.steps, cfg.train.seq_len, cfg.train.global_batch_tokens = STEPS, 32, 8 * 32
    cfg.train.micro_batch_size, cfg.train.validate_every, cfg.train.validation_rows = micro, 0, 16
    cfg.train.num_threads = 1
    cfg.optim.lr, cfg.optim.warmup_steps, cfg.optim.max_grad_norm = 1e-2, 4, 0.5
    cfg.parallel.strategy, cfg.parallel.dp_replicate, cfg.parallel.dp_shard = strategy, dp_replicate, dp_shard
    cfg.launcher.tasks_per_node = world
    cfg.precision.params = cfg.precision.compute = cfg.precision.reduce = precision
    cfg.checkpoint.every_steps = 0
    return cfg


def rows(attempt: Attempt) -> list[dict]:
    return [row for row in attempt.run.metrics() if row["kind"] == "train"]


@pytest.fixture(scope="module")
def runs(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Attempt]:
    root = tmp_path_factory.mktemp("runs")
    attempts = {}
    for precision in ("float32", "float64"):
        for layout in LAYOUTS:
            attempts[precision, layout] = start_run(root, f"{layout}-{precision}", small_config(text_file, layout, precision))
    run_gang([(attempt, LAYOUTS[layout][1]) for (_, layout), attempt in attempts.items()])
    return attempts


@pytest.mark.cluster
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_losses_agree_with_one_process_step_by_step(
    runs: dict[tuple[str, str], Attempt], layout: str, precision: str, tolerance: float
) -> None:
    expected, found = rows(runs[precision, "single"]), rows(runs[precision, layout])
    assert len(expected) == len(found) == STEPS
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(expected, found, strict=True))
    print(f"{layout} {precision}: largest relative difference {worst:.2e}")
    assert worst <= tolerance
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.5


@pytest.mark.cluster
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "single"])
def test_every_layout_sees_the_same_samples(runs: dict[tuple[str, str], Attempt], layout: str) -> None:
    expected = [row["data_hash"] for row in rows(runs["float32", "single"])]
    assert [row["data_hash"] for row in rows(runs["float32", layout])] == expected
    assert len(set(expected)) == STEPS
