"""Run directories as training would leave them, without training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from factory_train import storage
from factory_train.config import Config
from factory_train.run_dir import Attempt, RunDir

# Whole seconds keep the times in MLflow easy to compare.
START_S = 1_790_000_000.0
BASELINES = {"unigram": 6.6, "bigram_kneser_ney": 4.16}


def new_run(root: Path, name: str = "a", **tracking: Any) -> tuple[RunDir, Attempt, Config]:
    """Returns a run with one attempt that has not begun."""
    config = Config(recipe="llama_fsdp")
    config.train.steps = 20
    config.tracking.sync_every_s = 0.1
    for key, value in tracking.items():
        setattr(config.tracking, key, value)
    run = RunDir.create(root, config.recipe, name)
    return run, run.new_attempt(config), config


def train(attempt: Attempt, first: int, last: int, *, shift: float = 0.0) -> None:
    """Writes the rows of steps `first` to `last`, with a validation and a sample at every tenth."""
    rows: list[dict[str, Any]] = [{"kind": "start", "step": first - 1, "time": START_S}]
    for step in range(first, last + 1):
        time = START_S + step
        loss = 4.0 + 4.0 * math.exp(-step / 10) + shift
        figures = {"loss": loss, "grad_norm": 1.5, "lr": 1e-3, "tokens_per_s": 1000.0, "step_time_s": 0.5, "tokens_seen": 512 * step}
        rows.append(
            {"kind": "train", "step": step, "time": time, **figures, "skipped": 0, "data_hash": 7, "memory_bytes": 1e8, "tflops_per_s": 0.1}
        )
        if step % 10 == 0:
            rows.append({"kind": "validation", "step": step, "time": time, "loss": loss + 0.1, "bits_per_byte": 1.9})
            rows.append({"kind": "sample", "step": step, "time": time, "prompt": "def", "text": f" step_{step}():\n```"})
    with open(attempt.metrics_path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def finish(run: RunDir, attempt: Attempt, step: int = 20, *, register: bool = True) -> None:
    """Writes what the finish stage writes: evaluation, export, registration intent, and the verdict."""
    storage.write_json(run.data / "manifest.json", manifest())
    storage.write_atomic(run.data / "tokenizer.json", "{}")
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    evaluation = {
        "format_version": 1,
        "step": step,
        "checkpoint": f"step-{step:08d}",
        "loss": 3.9,
        "bits_per_byte": 1.88,
        "num_tokens": 1000,
    }
    evaluation |= {"num_bytes": 3500, "baselines": BASELINES, "sample": {"prompt": "import", "text": " os"}, "time": START_S + step}
    storage.write_json(run.evaluation / f"step-{step:08d}.json", evaluation)
    storage.write_atomic(run.export / "config.json", "{}")
    if register:
        storage.write_json(run.export / "registration.json", intent(run, step))
    attempt.write_verdict("done", 0, step=step, reason="trained, evaluated and exported")


def intent(run: RunDir, step: int) -> dict[str, Any]:
    return {
        "format_version": 1,
        "model_name": "llama_fsdp",
        "checkpoint": f"step-{step:08d}",
        "step": step,
        "export_path": str(run.export),
        "sha256": "ef" * 32,
        "tags": {"run": run.name},
        "metrics": {"validation/loss": 3.9, "validation/bits_per_byte": 1.88},
    }


def manifest() -> dict[str, Any]:
    splits = {name: {"num_tokens": 1000, "num_bytes": 3500, "num_documents": 9} for name in ("train", "validation")}
    return {"id": "9f" * 32, "description": "some text", "tokenizer": "bpe", "vocab_size": 512, "splits": splits, "baselines": BASELINES}
