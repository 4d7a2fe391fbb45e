"""Process-wide settings of torch: threads, determinism, matmul precision."""

from __future__ import annotations

import os

import torch

from factory_train.config import TrainConfig


def configure_runtime(cfg: TrainConfig, local_world_size: int) -> None:
    """Sets CPU threads and determinism for this process; call before any tensor work.

    Args:
        cfg: `num_threads` and `deterministic`.
        local_world_size: ranks that share this machine's cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(cfg.num_threads or max(1, cores // local_world_size))
    if torch.cuda.is_available():
        # TF32 for what is left in float32: the field's default for training, given up in deterministic mode.
        torch.backends.cuda.matmul.fp32_precision = "ieee" if cfg.deterministic else "tf32"
    if cfg.deterministic:
        # cuBLAS reads this when its first handle is made.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
