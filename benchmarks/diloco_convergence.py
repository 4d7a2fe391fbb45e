"""DiLoCo's variants at equal tokens on the built-in corpus: validation loss over seeds, through the public command.

    python benchmarks/diloco_convergence.py [--steps N] [--seeds 1 2 3] [--json FILE] [key=value ...]

Two islands of one rank, H = 20. Data-parallel is one rank with the batch of both: every layout of ranks gives the same numbers.
With --json, runs that the file has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

# The outer momentum walks up to 1 / (1 - 0.9) times as far as the inner steps: at the learning rate that is best for data-parallel
# training, classic DiLoCo with its published outer learning rate is beyond what a short run bears.
LR = 1e-3
_STREAMING = ("diloco=streaming", "diloco.delay=2")
VARIANTS = {
    "data-parallel": ("recipe=llama_ddp", "parallel=single"),
    "averaging": ("recipe=llama_diloco", "diloco=averaging"),
    "classic": ("recipe=llama_diloco", "diloco=classic", "diloco.sync_every=20"),
    "streaming + overlap": ("recipe=llama_diloco", *_STREAMING, "diloco.payload=fp32"),
    "... + int8": ("recipe=llama_diloco", *_STREAMING, "diloco.payload=int8"),
    "... + int4": ("recipe=llama_diloco", *_STREAMING, "diloco.payload=int4"),
}


def validation_loss(root: Path, variant: str, seed: int, steps: int, overrides: list[str]) -> float:
    """Trains once and returns the last validation loss, in nats a token: of the outer parameters where there are islands."""
    name = f"{list(VARIANTS).index(variant)}-{seed}"
    command = [
        *(sys.executable, "-m", "factory_train", *VARIANTS[variant], f"run={name}", "launcher=local", "launcher.tasks_per_node=1"),
        *("model.dim=32", "model.num_layers=4", "model.num_heads=4", "model.num_kv_heads=4", "model.ffn_dim=96", "data.vocab_size=512"),
        *(f"train.steps={steps}", f"train.seed={seed}", "train.seq_len=32", "train.global_batch_tokens=512"),
        *("train.micro_batch_size=16", "train.validate_every=0", "train.num_threads=1", "checkpoint.every_steps=100000"),
        *("train.validation_rows=1024", f"optim.lr={LR}", f"optim.warmup_steps={max(1, steps // 15)}", "tracking=none"),
        *("evaluation.sample_tokens=0", f"data.cache_dir={root / 'data'}", f"runs_root={root}", *overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (metrics,) = root.glob(f"*-{name}/attempts/0001/metrics.jsonl")
    rows = metrics.read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, reversed(rows)) if row["kind"] == "validation")


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    facts = {"steps": options.steps, "torch": torch.__version__, "overrides": overrides, "losses": {}}
    if options.json and options.json.exists():
        known = json.loads(options.json.read_text())
        assert {**known, "losses": {}} == facts, "the file is of other runs"
        facts = known
    losses: dict[str, dict[str, float]] = facts["losses"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for variant in VARIANTS:
                found = losses.setdefault(variant, {})
                if str(seed) in found:
                    continue
                began = time.monotonic()
                found[str(seed)] = validation_loss(Path(folder), variant, seed, options.steps, overrides)
                print(f"seed {seed}  {variant:20s} {found[str(seed)]:.4f}  ({time.monotonic() - began:.0f} s)", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(facts, indent=1) + "\n")
    base = statistics.fmean(losses["data-parallel"].values())
    print(f"\n{'':20s} {'mean':>7s} {'spread':>7s} {'gap':>8s}   {options.steps} steps of 512 tokens")
    for variant, found in losses.items():
        mean, spread = statistics.fmean(found.values()), max(found.values()) - min(found.values())
        print(f"{variant:20s} {mean:7.4f} {spread:7.4f} {mean - base:+8.4f}   {'  '.join(f'{loss:.4f}' for loss in found.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
