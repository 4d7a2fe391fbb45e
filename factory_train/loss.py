"""The training loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from factory_train.data.loader import IGNORE_INDEX


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
