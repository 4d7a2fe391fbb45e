"""The command line as a person uses it: a process of its own, its exit code and its output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

# A model and a corpus so small that a run takes seconds; everything else is the recipe's.
SMALL = (
    *("data.tokenizer=byte", "model.dim=32", "model.num_layers=2", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_dim=64"),
    *("train.seq_len=32", "train.global_batch_tokens=256", "train.micro_batch_size=4", "train.validation_rows=32", "train.log_every=1"),
    *("optim.warmup_steps=2", "evaluation.sample_tokens=8", "evaluation.temperature=0"),
)


def environment() -> dict[str, str]:
    """Returns the environment of a command that runs from the source tree."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def start(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """Starts `python -m factory_train` with these words in the folder `cwd`."""
    return subprocess.Popen(
        [sys.executable, "-m", "factory_train", *words],
        cwd=cwd,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Signals that a test sends to its own group must not reach the command by accident.
        start_new_session=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*words: str, cwd: Path, timeout_s: float = 180.0) -> subprocess.CompletedProcess[str]:
    """Runs the command to its end."""
    process = start(*words, cwd=cwd)
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{words} did not end within {timeout_s} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)
