"""The one reduction of a training step: loss, gradient norm, stop requests and sample hash in a single vector.

Everything ranks must agree on rides on it. The host reads the result one step late, from pinned memory, so a step
never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

# Places in the reduced vector.
_LOSS, _GRAD_SQUARES, _PREEMPT, _INTERRUPT, _HASH, _PARTS_WRITTEN, _PARTS_FAILED, _SAVE, _SIZE = range(9)


@dataclass(frozen=True)
class StepVerdict:
    """What all ranks know about a step, still on the device.

    Args:
        grad_norm: L2 norm of the summed gradient; scalar.
        skip: 1.0 when loss or gradient is not finite and the step must leave the weights alone, else 0.0; scalar.
    """

    grad_norm: torch.Tensor
    skip: torch.Tensor


@dataclass(frozen=True)
class StepFacts:
    """The same on the host, one step later.

    Args:
        parts_written, parts_failed: ranks whose part of the checkpoint under way is written, and failed.
        save: whether somebody asked for a checkpoint.
    """

    loss: float
    grad_norm: float
    skipped: bool
    preempt: bool
    interrupt: bool
    data_hash: int
    parts_written: int
    parts_failed: int
    save: bool = False


class StepReduction:
    """Sums a step's figures over the gang.

    Args:
        device: where the figures are.
        grad_copies: how many ranks hold the same gradient shard (see `ParallelModel`).
    """

    def __init__(self, device: torch.device, grad_copies: int) -> None:
        self._device, self._grad_copies = device, grad_copies
        self._pinned = device.type == "cuda"
        self._pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def reduce(
        self,
        loss: torch.Tensor,
        grad_squares: torch.Tensor,
        *,
        preempt: bool,
        interrupt: bool,
        data_hash: int,
        part_written: bool = False,
        part_failed: bool = False,
        save: bool = False,
    ) -> tuple[StepVerdict, StepFacts | None]:
        """Reduces one step and returns its verdict (on the device) and the facts of the step before (on the host).

        Args:
            loss: this rank's share of the step's loss; scalar.
            grad_squares: sum of the squares of this rank's reduced gradient shards; scalar.
            data_hash: hash of this rank's samples; an integer below 2**53 when summed over ranks.
            part_written, part_failed: how far this rank's part of the checkpoint under way is.
            save: whether this rank was asked for a checkpoint.
        """
        # float64: exact for the hash, and sums of squares of different shardings agree to the last digits.
        vector = torch.zeros(_SIZE, dtype=torch.float64)
        vector[_PREEMPT], vector[_INTERRUPT], vector[_HASH] = float(preempt), float(interrupt), float(data_hash)
        vector[_PARTS_WRITTEN], vector[_PARTS_FAILED], vector[_SAVE] = float(part_written), float(part_failed), float(save)
        vector = vector.pin_memory().to(self._device, non_blocking=True) if self._pinned else vector
        vector[_GRAD_SQUARES] = grad_squares.double() / self._grad_copies
        vector[_LOSS] = loss.double()
        dist.all_reduce(vector)
        verdict = StepVerdict(vector[_GRAD_SQUARES].sqrt(), (~torch.isfinite(vector[:2]).all()).float())
        previous = self.flush()
        self._pending = self._copy(vector)
        return verdict, previous

    def flush(self) -> StepFacts | None:
        """Returns the facts of the last reduced step, waiting for the device if need be; None if already read."""
        if self._pending is None:
            return None
        vector, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        loss, squares, preempt, interrupt, data_hash, written, failed, save = vector.tolist()
        grad_norm = squares**0.5
        skipped = not torch.isfinite(vector[:2]).all().item()
        return StepFacts(loss, grad_norm, skipped, preempt > 0, interrupt > 0, int(data_hash), int(written), int(failed), save > 0)

    def _copy(self, vector: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if not self._pinned:
            return vector, None
        host = torch.empty(_SIZE, dtype=torch.float64, pin_memory=True).copy_(vector, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, event
