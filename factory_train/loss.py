"""The training loss: what `train.loss` names, from logits, or from hidden states without ever holding all logits."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F

from factory_train.config import TrainConfig
from factory_train.data.rows import IGNORE_INDEX
from factory_train.distributed.parallelize import ParallelModel
from factory_train.errors import ConfigError
from factory_train.kernels.loss import linear_cross_entropy
from factory_train.models.language_model import LanguageModel
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


def summed_z_loss(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Returns the sum over target tokens of log²Z, Z being the softmax's denominator (PaLM, arXiv 2204.02311, section 5)."""
    log_sum_BT = torch.logsumexp(logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)), dim=-1)
    return log_sum_BT.square().masked_fill(targets_BT == IGNORE_INDEX, 0.0).sum()


class TrainingLoss:
    """The sum over a micro-batch's target tokens, with `train.z_loss` added.

    Args:
        cfg: `loss`, `loss_impl` and `z_loss`.
        model: what is trained.
        device: of this rank; on cards the cross-entropy is computed in chunks unless the configuration says otherwise.

    Raises:
        ConfigError: `train.loss_impl=chunked`, and the model's head is not a matrix.
    """

    def __init__(self, cfg: TrainConfig, model: ParallelModel, device: torch.device) -> None:
        self._model, self._z_loss = model, cfg.z_loss
        self._from_logits = LOSSES.get(cfg.loss)
        self._module = cast(LanguageModel, model.module)
        has_head = self._module.head_weight() is not None
        if cfg.loss_impl == "chunked" and not has_head:
            raise ConfigError(
                f"{type(self._module).__name__} does not say which matrix its output head is",
                where="train.loss_impl",
                fix="train.loss_impl=plain, or give the model a head_weight()",
            )
        on_card = cfg.loss_impl == "auto" and device.type == "cuda" and cfg.loss == "cross_entropy" and has_head
        self.chunked = cfg.loss_impl == "chunked" or on_card

    def __call__(self, targets_BT: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        """Returns the loss, a scalar.

        Args:
            targets_BT: token ids; `IGNORE_INDEX` marks places that do not count.
            inputs: what the model takes: tokens_BT, and more where it takes more.
        """
        if self.chunked:
            return self._model(*inputs, head=lambda x_BTD: self._from_hidden(x_BTD, targets_BT))
        logits_BTV = self._model(*inputs)
        loss: torch.Tensor = self._from_logits(logits_BTV, targets_BT)
        return loss + self._z_loss * summed_z_loss(logits_BTV, targets_BT) if self._z_loss else loss

    def _from_hidden(self, x_BTD: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        # Asked for inside of the forward pass: FSDP2 has gathered the head by then.
        weight_VD = self._module.head_weight()
        assert weight_VD is not None
        return linear_cross_entropy(x_BTD.flatten(0, 1), weight_VD, targets_BT.flatten(), ignore_index=IGNORE_INDEX, z_loss=self._z_loss)
