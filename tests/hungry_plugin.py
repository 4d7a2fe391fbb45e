"""A plugin for tests of diagnostics: losses that leave reference cycles behind, or ask for more memory than there is."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import torch

from factory_train.loss import summed_cross_entropy
from factory_train.registries import LOSSES

_calls = 0


@LOSSES.register("cycles")
def cycles(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """The cross-entropy, leaving behind a tensor that only the garbage collector can free; notes when it was at work."""
    global _calls
    _calls += 1
    if _calls == 1:
        gc.callbacks.append(_note)
    kept: list[object] = [torch.zeros(1)]
    kept.append(kept)
    return summed_cross_entropy(logits_BTV, targets_BT)


def _note(phase: str, info: dict[str, int]) -> None:
    if phase == "stop":
        with open(Path(os.environ["COLLECTED_INTO"]) / f"rank-{os.environ['FACTORY_TRAIN_RANK']}", "a") as file:
            file.write(f"{_calls} {info['generation']} {info['collected']}\n")


@LOSSES.register("too_large_for_the_card")
def too_large_for_the_card(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Fails in its third call as CUDA's allocator does."""
    global _calls
    _calls += 1
    if _calls == 3:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.69 GiB")
    return summed_cross_entropy(logits_BTV, targets_BT)


@LOSSES.register("too_large_for_the_host")
def too_large_for_the_host(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Asks for four petabytes in its third call."""
    global _calls
    _calls += 1
    if _calls == 3:
        torch.empty(10**15)
    return summed_cross_entropy(logits_BTV, targets_BT)
