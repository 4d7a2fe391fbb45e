"""What every architecture offers to training, evaluation and export.

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LanguageModel(nn.Module):
    """A decoder that predicts the next token.

    `layers` holds the blocks: each is sharded, recomputed and compiled by itself. Everything outside of them belongs to
    the root. Buffers are derived, never saved: after `to_empty` or a change of dtype, call `init_buffers`.
    """

    layers: nn.ModuleList
    max_seq_len: int

    def hidden(self, tokens_BT: Tensor, positions: Tensor | None = None) -> Tensor:
        """Returns the normalised output of the last layer, x_BTD.

        Args:
            tokens_BT: token ids.
            positions: place of each token, None counts from 0. Of shape (T,), all rows are one context each. Of shape (B, T), a row
                holds documents: one begins wherever a position is not one more than that before it, and no token may
                attend to another document.
        """
        raise NotImplementedError

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Applies the output head: logits_BTV."""
        raise NotImplementedError

    def head_weight(self) -> Tensor | None:
        """Returns the matrix W_VD where `logits` is x Wᵀ and nothing else; the loss then needs no logits."""
        return None

    def init_buffers(self, device: torch.device) -> None:
        """Computes every buffer anew on `device`."""
        raise NotImplementedError

    def initial_std(self, name: str) -> float | None:
        """Returns the standard deviation of a parameter's normal initialisation; None means that it starts as ones."""
        raise NotImplementedError

    def forward(self, tokens_BT: Tensor, positions: Tensor | None = None, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns the logits of the token after each one, logits_BTV, or what `head` makes of the hidden states x_BTD."""
        x_BTD = self.hidden(tokens_BT, positions)
        return self.logits(x_BTD) if head is None else head(x_BTD)
