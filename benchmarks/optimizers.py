"""Muon against AdamW: validation loss at equal tokens on the built-in corpus, over seeds, through the public command.

    python benchmarks/optimizers.py [--steps N] [--seeds N] [--lrs adamw=3e-3,6e-3 muon=3e-3] [--json FILE] [key=value ...]

Each optimizer first chooses among its learning rates with one seed of its own, which does not count afterwards: the
comparison is then of each at its best. The claim: Muon's mean is at most AdamW's mean plus AdamW's spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# Wide enough that the best of each is no end of its range.
LRS = {"adamw": [5e-4, 1e-3, 2e-3, 4e-3], "muon": [4e-3, 8e-3, 1.6e-2]}
TUNING_SEED = 99


def validation_loss(root: Path, optimizer: str, lr: float, seed: int, steps: int, overrides: list[str]) -> float:
    """Trains once and returns the last validation loss, in nats a token."""
    name = f"{optimizer}-{lr:g}-{seed}"
    command = [
        *(sys.executable, "-m", "factory_train", "recipe=llama_fsdp", "parallel=single", f"optim={optimizer}", f"run={name}"),
        *("model.dim=96", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=4", "model.ffn_dim=256", "data.vocab_size=512"),
        *(f"train.steps={steps}", f"train.seed={seed}", "train.seq_len=128", "train.global_batch_tokens=2048"),
        *("train.micro_batch_size=16", "train.validate_every=0", "train.num_threads=1", "checkpoint.every_steps=100000"),
        *(f"optim.lr={lr}", f"optim.warmup_steps={max(1, steps // 15)}", "tracking=none", "evaluation.sample_tokens=0"),
        *(f"data.cache_dir={root / 'data'}", f"runs_root={root}", *overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (root / f"llama_fsdp-{name}" / "attempts/0001/metrics.jsonl").read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, reversed(rows)) if row["kind"] == "validation")


def main() -> int:
    """Prints the table; exits 1 when Muon is worse than AdamW by more than AdamW's spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="*", default=[], help="adamw=LR,LR muon=LR,LR")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    lrs = LRS | {name: [float(lr) for lr in values.split(",")] for name, values in (item.split("=") for item in options.lrs)}
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for optimizer, candidates in lrs.items():
            tuning = {lr: validation_loss(root, optimizer, lr, TUNING_SEED, options.steps, overrides) for lr in candidates}
            lr = min(tuning, key=lambda lr: tuning[lr])
            losses = [validation_loss(root, optimizer, lr, seed, options.steps, overrides) for seed in range(1, options.seeds + 1)]
            mean, spread = statistics.fmean(losses), max(losses) - min(losses)
            results[optimizer] = {"lr": lr, "tuning": tuning, "losses": losses, "mean": mean, "spread": spread}
            tried = "  ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tuning.items())
            shown = "  ".join(f"{loss:.4f}" for loss in losses)
            print(f"{optimizer:8s} lr {lr:<7g} mean {mean:.4f}  spread {spread:.4f}  ({shown})  tried {tried}", flush=True)
    no_worse = results["muon"]["mean"] <= results["adamw"]["mean"] + results["adamw"]["spread"]
    print(f"muon reaches adamw's loss within its spread over seeds: {'yes' if no_worse else 'no'}; {options.steps} steps of 2,048 tokens")
    if options.json:
        facts = {"steps": options.steps, "torch": torch.__version__, "overrides": overrides, "results": results, "no_worse": no_worse}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if no_worse else 1


if __name__ == "__main__":
    sys.exit(main())
