"""Tensors that are float32 to everybody else and something narrower in memory.

A checkpoint holds master weights and moments in float32 whatever the optimizer keeps (docs/checkpoint-format.md). These classes
have as much of a tensor's interface as saving and loading use, and decode one tensor at a time, while it is being copied:
a float32 copy of the whole state never exists.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from factory_train.kernels.block_codes import decode_root, decode_signed, encode_root, encode_signed, exact_sqrt, in_blocks
from factory_train.kernels.split_float import join_float32, split_float32


class EncodedTensor(ABC):
    """A float32 tensor of a shape, kept in another form.

    Args:
        shape: of the values.
        device: where it is kept.
    """

    dtype = torch.float32

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.shape, self.device = shape, device

    @abstractmethod
    def detach(self) -> Tensor:
        """Returns the values, decoded, in float32 on the device."""

    @abstractmethod
    def copy_(self, values: Tensor) -> EncodedTensor:
        """Encodes `values`, of the same shape, any floating type and device."""

    @property
    def natives(self) -> Mapping[str, Tensor]:
        """What is kept, where coding decoded values again is not the cheapest way back; "codes" are shaped like the values."""
        return {}

    def element_size(self) -> int:
        return 4

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return 4 * self.numel()

    def _wide(self, values: Tensor) -> Tensor:
        return values.detach().to(self.device, torch.float32)


Stored = Tensor | EncodedTensor


class Rounded(EncodedTensor):
    """Values rounded to a narrower floating type; reading them back is exact."""

    def __init__(self, narrow: Tensor) -> None:
        super().__init__(narrow.shape, narrow.device)
        self._narrow = narrow

    def detach(self) -> Tensor:
        return self._narrow.detach().float()

    def copy_(self, values: Tensor) -> Rounded:
        self._narrow.copy_(values)
        return self


class SplitWeight(EncodedTensor):
    """A bfloat16 weight and its int16 remainder: exact both ways."""

    def __init__(self, high: Tensor, remainder: Tensor) -> None:
        super().__init__(high.shape, high.device)
        self._high, self._remainder = high, remainder

    def detach(self) -> Tensor:
        return join_float32(self._high.detach(), self._remainder)

    def copy_(self, values: Tensor) -> SplitWeight:
        high, remainder = split_float32(self._wide(values))
        self._high.copy_(high)
        self._remainder.copy_(remainder)
        return self


class Coded(EncodedTensor):
    """First or second moments in 8 bits (`kernels/block_codes.py`). What was decoded is coded to the same codes again.

    Args:
        codes: int8 (first moments) or uint8 (second), of the values' shape.
        scale: float32, one for every 256 elements.
    """

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__(codes.shape, codes.device)
        self._codes, self._scale = codes, scale

    @property
    def natives(self) -> Mapping[str, Tensor]:
        return {"codes": self._codes, "scale": self._scale}

    def detach(self) -> Tensor:
        decode = decode_root if self._codes.dtype == torch.uint8 else decode_signed
        return decode(in_blocks(self._codes), self._scale).view(-1)[: self.numel()].view(self.shape)

    def copy_(self, values: Tensor) -> Coded:
        rows = in_blocks(self._wide(values))
        codes, scale = encode_root(exact_sqrt(rows)) if self._codes.dtype == torch.uint8 else encode_signed(rows)
        self._codes.copy_(codes.view(-1)[: self.numel()].view(self.shape))
        self._scale.copy_(scale)
        return self
