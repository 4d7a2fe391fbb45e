"""The ranks of one island, as the exchange with other islands sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Gang(Protocol):
    """The ranks of one island (`checkpoint.agreement.Ranks`)."""

    rank: int

    def agree(self, doing: str, action: Callable[[], Any]) -> list[Any]: ...

    def agree_on_main(self, doing: str, action: Callable[[], Any]) -> Any: ...


class Copies:
    """Ranks of an island that hold the same shards.

    Args:
        group: of these ranks, with a CPU backend; None for a rank without copies.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.is_first = group is None or dist.get_rank(group) == 0

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Makes the tensors those of the first of them."""
        if self._group is None:
            return
        for tensor in tensors:
            host = tensor.cpu()
            dist.broadcast(host, group_src=0, group=self._group)
            if not self.is_first:
                tensor.copy_(host)
