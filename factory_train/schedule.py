"""Learning-rate schedules: the rate is a pure function of the step."""

from __future__ import annotations

import math

from factory_train.config import OptimConfig
from factory_train.registries import SCHEDULES


def wsd(progress: float, cfg: OptimConfig) -> float:
    """Warmup-stable-decay: constant, then linear to the end over the last `decay_fraction` (Hu et al. 2024, MiniCPM)."""
    start = 1.0 - cfg.decay_fraction
    return 1.0 if progress <= start else (1.0 - progress) / cfg.decay_fraction


def cosine(progress: float, cfg: OptimConfig) -> float:
    """Half a cosine (Loshchilov and Hutter 2017)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float, cfg: OptimConfig) -> float:
    """A straight line to the end."""
    return 1.0 - progress


def constant(progress: float, cfg: OptimConfig) -> float:
    """The peak, to the end."""
    return 1.0


def learning_rate(step: int, total_steps: int, cfg: OptimConfig) -> float:
    """Returns the learning rate of the step that follows `step` completed ones.

    Args:
        step: completed optimizer steps, in [0, total_steps).
        total_steps: length of the run in steps.
    """
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    # The first step after warm-up is at the peak; the shape reaches its floor one step past the last.
    progress = (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps)
    shape = SCHEDULES.get(cfg.schedule)(min(progress, 1.0), cfg)
    return cfg.lr * (cfg.min_lr_ratio + (1.0 - cfg.min_lr_ratio) * shape)
