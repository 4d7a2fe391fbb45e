"""Character-level quality and speed against nanoGPT's published CPU figure (validation loss 1.88 after 2,000 iterations).

    python benchmarks/char.py path/to/tinyshakespeare.txt

4 layers, 4 heads, width 128, context 64, batch 12, no dropout, the last 10 % held out in windows of 64: nanoGPT's
documented CPU set-up. The whole product runs, through its own command line, in one process.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

NANOGPT_LOSS = 1.88


def main() -> int:
    """Trains once and prints validation loss and tokens per second; exits 1 when the loss is worse than nanoGPT's."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as root:
        command = [
            *(sys.executable, "-m", "factory_train", "recipe=llama_fsdp", "parallel=single", "model=llama_char", "run=char"),
            *(f"data.path={Path(sys.argv[1]).absolute()}", "data.tokenizer=char", "data.validation_fraction=0.1"),
            *("train.steps=2000", "train.seq_len=64", "train.global_batch_tokens=768", "train.micro_batch_size=12"),
            *("train.validation_rows=100000", "train.validate_every=500", "train.log_every=200", "checkpoint.every_steps=2000"),
            *("optim.lr=4e-3", "optim.schedule=cosine", "optim.warmup_steps=100", "optim.min_lr_ratio=0.02", "optim.beta2=0.99"),
            *("tracking=none", f"runs_root={root}", *sys.argv[2:]),
        ]
        subprocess.run(command, check=True)
        run = Path(root) / "llama_fsdp-char"
        rows = [json.loads(line) for line in (run / "attempts/0001/metrics.jsonl").read_text().splitlines()]
        evaluation = json.loads(next((run / "evaluation").glob("step-*.json")).read_text())
    speed = statistics.median(row["tokens_per_s"] for row in rows if row["kind"] == "train")
    print(f"validation loss {evaluation['loss']:.4f} over {evaluation['num_tokens']:,} characters (nanoGPT published: {NANOGPT_LOSS})")
    print(f"training speed  {speed:,.0f} tokens/s (median of 20-step windows)")
    return 0 if evaluation["loss"] <= NANOGPT_LOSS else 1


if __name__ == "__main__":
    sys.exit(main())
