"""optim=adamw_fused: AdamW in one pass over weights and states in the formats that `optim.state` and `optim.master` name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from factory_train.config import OptimConfig
from factory_train.distributed.encoded import Stored
from factory_train.distributed.flat_weights import shard_owners
from factory_train.distributed.initialization import take_remainder
from factory_train.fused_adamw import FusedAdamW


class AdamWFused:
    """AdamW (Loshchilov and Hutter 2019) behind the seam of `factory_train.optim`, over `FusedAdamW`.

    Args:
        model: its parameters may be plain tensors or shards of FSDP2; matrices are decayed, vectors are not. With
            `optim.master=split` they are bfloat16 and may carry what is left of their initial float32 values.
        cfg: betas, eps, weight decay, clipping, and the formats.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig) -> None:
        self._parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups = [
            {"params": [p for p in self._parameters.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
            {"params": [p for p in self._parameters.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
        split = cfg.master == "split"
        self.fused = FusedAdamW(
            [group for group in groups if group["params"]],
            lr=cfg.lr,
            betas=(cfg.beta1, cfg.beta2),
            eps=cfg.eps,
            max_grad_norm=cfg.max_grad_norm,
            state=cfg.state,
            master=cfg.master,
            remainders={parameter: take_remainder(parameter) for parameter in self._parameters.values()} if split else None,
            owners=shard_owners(model),
        )
        slots = {name: self.fused.slot(parameter) for name, parameter in self._parameters.items()}
        self._state: dict[str, dict[str, Stored]] = {
            key: {name: slot.moment(key) for name, slot in slots.items()} for key in ("exp_avg", "exp_avg_sq")
        }
        self._split = split

    def step(self, *, lr: float, grad_norm: Tensor, skip: Tensor) -> None:
        for group in self.fused.param_groups:
            group["lr"] = lr
        self.fused.step(grad_squares=grad_norm.double().square(), skip=skip)

    def zero_grad(self) -> None:
        self.fused.zero_grad()

    def gradients(self) -> list[Tensor]:
        return self.fused.gradients()

    def gradient_squares(self) -> torch.Tensor:
        return self.fused.gradient_squares()

    def state(self) -> Mapping[str, Mapping[str, Stored]]:
        return self._state

    def masters(self) -> Mapping[str, Stored]:
        """Returns the float32 weights where the model has only their upper halves."""
        return {name: self.fused.master(parameter) for name, parameter in self._parameters.items()} if self._split else {}

    def step_count(self) -> int:
        return self.fused.step_count()

    def set_step_count(self, count: int) -> None:
        self.fused.set_step_count(count)
