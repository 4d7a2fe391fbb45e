"""Muon, and AdamW with split weights and 8-bit states, against AdamW: validation loss at equal tokens on the built-in corpus.

    python benchmarks/optimizers.py [--steps N] [--seeds N] [--lrs adamw=3e-3,6e-3 muon=3e-3 ...] [--json FILE] [key=value ...]

Each optimizer first chooses among its learning rates with one seed of its own, which does not count afterwards: the
comparison is then of each at its best. The claim: a mean is at most AdamW's mean plus AdamW's spread over seeds. With --json
results are kept as they come, and the same command continues with those that are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

# Wide enough that the best of each is no end of its range. Formats of AdamW take the rate that is best for AdamW in float32.
LRS = {"adamw": [5e-4, 1e-3, 2e-3, 4e-3], "muon": [4e-3, 8e-3, 1.6e-2]}
_SPLIT = ["optim=adamw_fused", "optim.master=split", "precision=bf16"]
OVERRIDES = {
    "adamw": ["optim=adamw"],
    "muon": ["optim=muon"],
    "fp32+int8": ["optim=adamw_fused", "optim.state=int8"],
    "adamw bf16": ["optim=adamw", "precision=bf16"],
    "split+fp32": _SPLIT,
    "split+bf16": [*_SPLIT, "optim.state=bf16"],
    "split+int8": [*_SPLIT, "optim.state=int8"],
}
# What each is compared with.
BASELINES = {"muon": "adamw", "fp32+int8": "adamw", "split+fp32": "adamw bf16", "split+bf16": "adamw bf16", "split+int8": "adamw bf16"}
TUNING_SEED = 99


def validation_loss(root: Path, data: Path, optimizer: str, lr: float, seed: int, steps: int, overrides: list[str]) -> float:
    """Trains once and returns the last validation loss, in nats a token."""
    name = f"{optimizer.replace(' ', '-').replace('+', '-')}-{lr:g}-{seed}"
    command = [
        *(sys.executable, "-m", "factory_train", "recipe=llama_fsdp", "parallel=single", *OVERRIDES[optimizer], f"run={name}"),
        *("model.dim=96", "model.num_layers=3", "model.num_heads=4", "model.num_kv_heads=4", "model.ffn_dim=256", "data.vocab_size=512"),
        *(f"train.steps={steps}", f"train.seed={seed}", "train.seq_len=128", "train.global_batch_tokens=2048"),
        *("train.micro_batch_size=16", "train.validate_every=0", "train.num_threads=1", "checkpoint.every_steps=100000"),
        *(f"optim.lr={lr}", f"optim.warmup_steps={max(1, steps // 15)}", "tracking=none", "evaluation.sample_tokens=0"),
        *(f"data.cache_dir={data}", f"runs_root={root}", *overrides),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = (root / f"llama_fsdp-{name}" / "attempts/0001/metrics.jsonl").read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, reversed(rows)) if row["kind"] == "validation")


def main() -> int:
    """Prints the table; exits 1 when one is worse than its baseline by more than the baseline's spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=list(OVERRIDES), default=list(OVERRIDES), help="of these, and what is in --json")
    parser.add_argument("--lrs", nargs="*", default=[], help="adamw=LR,LR muon=LR,LR")
    parser.add_argument("--data", type=Path, help="folder of prepared data, kept from one call to the next")
    parser.add_argument("--json", type=Path)
    options, overrides = parser.parse_known_args()
    lrs = LRS | {name: [float(lr) for lr in values.split(",")] for name, values in (item.split("=") for item in options.lrs)}
    facts: dict[str, Any] = {"steps": options.steps, "torch": torch.__version__, "overrides": overrides, "results": {}}
    if options.json and options.json.exists():
        facts = json.loads(options.json.read_text())
        assert (facts["steps"], facts["overrides"]) == (options.steps, overrides), f"{options.json} is of another comparison"
    results = facts["results"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = options.data or root / "data"
        for optimizer in options.only:
            found = results.setdefault(optimizer, {"tuning": {}, "losses": []})
            candidates = lrs.get(optimizer) or [results[_of_same_family(optimizer)]["lr"]]
            for lr in candidates if len(candidates) > 1 else []:
                if f"{lr:g}" not in found["tuning"]:
                    found["tuning"][f"{lr:g}"] = validation_loss(root, data, optimizer, lr, TUNING_SEED, options.steps, overrides)
                    _keep(options.json, facts)
            best = min(candidates, key=lambda lr: found["tuning"].get(f"{lr:g}", 0.0))
            for seed in range(len(found["losses"]) + 1, options.seeds + 1):
                found["losses"].append(validation_loss(root, data, optimizer, best, seed, options.steps, overrides))
                _keep(options.json, facts)
            losses = found["losses"]
            found |= {"lr": best, "mean": statistics.fmean(losses), "spread": max(losses) - min(losses)}
            _keep(options.json, facts)
            shown = "  ".join(f"{loss:.4f}" for loss in losses)
            tried = "  ".join(f"{rate}: {loss:.4f}" for rate, loss in found["tuning"].items())
            print(
                f"{optimizer:11s} lr {best:<7g} mean {found['mean']:.4f}  spread {found['spread']:.4f}  ({shown})  tried {tried}",
                flush=True,
            )
    worse = []
    for name, baseline in BASELINES.items():
        if name in results and "mean" in results[name] and "mean" in results.get(baseline, {}):
            limit = results[baseline]["mean"] + results[baseline]["spread"]
            holds = results[name]["mean"] <= limit
            worse += [] if holds else [name]
            print(f"{name} within {baseline}'s loss and spread: {'yes' if holds else 'no'} ({results[name]['mean']:.4f} <= {limit:.4f})")
    facts["worse"] = worse
    _keep(options.json, facts)
    return 1 if worse else 0


def _of_same_family(optimizer: str) -> str:
    """Returns the optimizer whose learning rate one takes: AdamW's in float32."""
    return "adamw" if optimizer not in LRS else optimizer


def _keep(path: Path | None, facts: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
