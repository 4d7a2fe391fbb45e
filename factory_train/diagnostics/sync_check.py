"""Looks, once and early in training, for code that makes the host wait for the card."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Before that, compilation, allocation and the tuning of kernels wait for good reasons.
_AFTER_STEPS = 5
_STEPS = 3
_MESSAGE = "called a synchronizing CUDA operation"
_TORCH = str(Path(torch.__file__).parent)


class SyncCheck:
    """Runs a few steps under PyTorch's sync-debug mode and names the places in an event; then never again.

    Args:
        device: nothing is checked where it is not a CUDA device.
        record: called with the name of an event and its facts.
        set_mode: `torch.cuda.set_sync_debug_mode`.
    """

    def __init__(
        self, device: torch.device, record: Callable[..., None], set_mode: Callable[[int | str], None] = torch.cuda.set_sync_debug_mode
    ) -> None:
        self._record, self._set_mode = record, set_mode
        self._steps_seen = 0
        self._done = device.type != "cuda"
        self._places: Counter[str] = Counter()
        self._caught: warnings.catch_warnings[None] | None = None

    def before_step(self) -> None:
        """Switches the mode on if this step is one of those to look at."""
        if self._done or self._steps_seen < _AFTER_STEPS:
            return
        self._caught = warnings.catch_warnings()
        self._caught.__enter__()
        shown = warnings.showwarning

        def note(message: Warning | str, *rest: Any, **more: Any) -> None:
            if _MESSAGE in str(message):
                self._places[_caller()] += 1
            else:
                shown(message, *rest, **more)

        warnings.showwarning = note
        # Not "once", which is the default: every step counts.
        warnings.filterwarnings("always", message=f".*{_MESSAGE}")
        self._set_mode("warn")

    def after_step(self, step: int) -> None:
        """Switches the mode off, and tells what was found when the last step was looked at."""
        if self._done:
            return
        self.close()
        self._steps_seen += 1
        if self._steps_seen == _AFTER_STEPS + _STEPS:
            self._done = True
            if self._places:
                places = [f"{place} ({count / _STEPS:.3g} times a step)" for place, count in self._places.most_common()]
                self._record("host-sync", step=step, steps=_STEPS, places=places)

    def close(self) -> None:
        """Switches the mode off, if it is on."""
        if self._caught is not None:
            self._set_mode("default")
            self._caught.__exit__(None, None, None)
            self._caught = None


def _caller() -> str:
    """Returns file and line of the innermost frame that is neither PyTorch's nor this module's."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename not in (__file__, warnings.__file__)]
    own = [frame for frame in frames if not frame.filename.startswith(_TORCH)]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno} in {frame.name}"
