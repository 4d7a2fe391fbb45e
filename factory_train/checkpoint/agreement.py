"""Ranks that do something together and all learn how it went, so that an error on one never leaves the others waiting."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from factory_train.checkpoint.failure import describe, rebuild


class Ranks:
    """The ranks of one gang, talking over CPU tensors.

    Args:
        rank, world_size: place of this process. A world of one never communicates.
        group: default: all ranks. If it has no CPU backend, a gloo group beside it is made once.
    """

    def __init__(self, rank: int, world_size: int, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.world_size = rank, world_size
        self._group: dist.ProcessGroup | None = None
        if world_size > 1:
            whole = group or dist.group.WORLD
            assert whole is not None, "several ranks, but no process group"
            self._group = _cpu_group(whole)
            assert dist.get_world_size(self._group) == world_size

    @staticmethod
    def current() -> Ranks:
        """Returns all ranks of the default process group, or a world of one where there is none."""
        if dist.is_available() and dist.is_initialized():
            return Ranks(dist.get_rank(), dist.get_world_size())
        return Ranks(0, 1)

    def agree(self, doing: str, action: Callable[[], Any]) -> list[Any]:
        """Runs `action` on every rank and returns every rank's JSON value, in order of rank.

        Args:
            doing: what is being done, for the message.

        Raises:
            FactoryTrainError: the action failed somewhere. All ranks raise the same error, that of the lowest rank
                that failed, as CheckpointError unless it already is one of ours.
        """
        cause: Exception | None = None
        try:
            mine = json.dumps({"value": action(), "failure": None})
        except Exception as error:
            cause = error
            mine = json.dumps({"value": None, "failure": describe(error, doing, self.rank)})
        outcomes = [json.loads(outcome) for outcome in self._gather(mine)]
        failures = [outcome["failure"] for outcome in outcomes if outcome["failure"]]
        if failures:
            raise rebuild(failures[0], len(failures)) from cause
        return [outcome["value"] for outcome in outcomes]

    def agree_on_main(self, doing: str, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0 alone and returns its JSON value on every rank; errors as in `agree`."""
        return self.agree(doing, lambda: action() if self.rank == 0 else None)[0]

    def _gather(self, text: str) -> list[str]:
        """Returns every rank's text; torch's own object collectives would unpickle what they receive."""
        if self.world_size == 1:
            return [text]
        mine = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]), group=self._group)
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: mine.numel()] = mine
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
        dist.all_gather(received, padded, group=self._group)
        return [data[: int(size)].numpy().tobytes().decode() for data, size in zip(received, sizes, strict=True)]


def _cpu_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return group if "cpu:gloo" in dist.get_backend_config(group) else _gloo_beside(group)


@functools.lru_cache(maxsize=1)
def _gloo_beside(group: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo")
