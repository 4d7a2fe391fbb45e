"""The training loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from factory_train.config import TrainConfig
from factory_train.data.loader import IGNORE_INDEX
from factory_train.registries import LOSSES


def summed_cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Returns the sum over target tokens of -log p(target), in nats; a scalar in at least float32.

    A sum, not a mean: the caller divides by the number of targets of the whole step, so that accumulation,
    padding and uneven ranks cannot change the result.

    Args:
        logits_BTV: unnormalised scores.
        targets_BT: token ids; `IGNORE_INDEX` marks places that do not count.
    """
    logits = logits_BTV.flatten(0, 1)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )


def training_loss(cfg: TrainConfig) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Returns what `train.loss` names: called like `summed_cross_entropy`, and a sum as it is; raises ConfigError."""
    return LOSSES.get(cfg.loss)
