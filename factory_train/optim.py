"""The optimizer seam, and AdamW behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim.adamw import adamw

from factory_train.config import OptimConfig
from factory_train.distributed.box import local_tensor
from factory_train.distributed.encoded import Stored
from factory_train.registries import OPTIMIZERS


class Optimizer(Protocol):
    """What the trainer and the checkpoint ask of an optimizer.

    It works on this rank's shards (`local_tensor` of each parameter), so one implementation serves every strategy.
    """

    def step(self, *, lr: float, grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        """Updates the weights from their gradients without waiting for the device.

        Args:
            lr: learning rate of this step.
            grad_norm: L2 norm of the whole gradient; scalar on the device. Clipping follows from it.
            skip: 1.0 leaves weights, state and step counters as they are; scalar on the device.
        """
        ...

    def zero_grad(self) -> None:
        """Drops the gradients."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """Returns this rank's gradient shards."""
        ...

    def state(self) -> Mapping[str, Mapping[str, Stored]]:
        """Returns the canonical state by kind ("exp_avg") and parameter name; each tensor is shaped like the local shard."""
        ...

    def step_count(self) -> int:
        """Returns how many updates were made (skipped ones not counted); waits for the device."""
        ...

    def set_step_count(self, count: int) -> None:
        """Continues counting from a checkpoint; the caller fills the tensors of `state()` in place."""
        ...


@runtime_checkable
class OwnsWeights(Optimizer, Protocol):
    """An optimizer that keeps master weights in a form of its own, and sums the squares of gradients itself."""

    def masters(self) -> Mapping[str, Stored]:
        """Returns the float32 weights, by name, of parameters that are narrower than that in the model."""
        ...

    def gradient_squares(self) -> torch.Tensor:
        """Returns the sum of the squares of this rank's gradient shards; float64 scalar on the device."""
        ...


def masters_of(optimizer: Optimizer) -> Mapping[str, Stored]:
    """Returns the float32 weights that are not the model's own parameters."""
    return optimizer.masters() if isinstance(optimizer, OwnsWeights) else {}


def squares_of(optimizer: Optimizer) -> torch.Tensor:
    """Returns the sum of the squares of this rank's gradient shards; float64 scalar on their device."""
    if isinstance(optimizer, OwnsWeights):
        return optimizer.gradient_squares()
    grads = optimizer.gradients()
    held = [grad for grad in grads if grad.numel()]
    if not held:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else None)
    return torch.stack([norm.double() for norm in torch._foreach_norm(held)]).square().sum()


class AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused, with clipping and the skip decision inside the same pass.

    Args:
        model: its parameters may be plain tensors or DTensors; matrices are decayed, vectors are not.
        cfg: betas, eps, weight decay, clipping.
        names: the parameters it updates; default: all that are trained.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig, names: Collection[str] | None = None) -> None:
        self._cfg = cfg
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._parameters = {name: parameter for name, parameter in trained.items() if names is None or name in names}
        shards = {name: local_tensor(parameter.detach()) for name, parameter in self._parameters.items()}
        self._exp_avg = {name: torch.zeros_like(shard) for name, shard in shards.items()}
        self._exp_avg_sq = {name: torch.zeros_like(shard) for name, shard in shards.items()}
        self._steps = {name: torch.zeros((), device=shard.device) for name, shard in shards.items()}
        # A rank can hold an empty shard of a small parameter; it has nothing to update there.
        present = [name for name, shard in shards.items() if shard.numel()]
        self._groups = [
            (cfg.weight_decay, [name for name in present if self._parameters[name].ndim >= 2]),
            (0.0, [name for name in present if self._parameters[name].ndim < 2]),
        ]

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: torch.Tensor, skip: torch.Tensor) -> None:
        # Dividing by max(1, norm / max_norm) inside the update saves a pass over the gradients.
        divisor = (grad_norm / self._cfg.max_grad_norm).clamp(min=1.0) if self._cfg.max_grad_norm else torch.ones_like(grad_norm)
        for weight_decay, names in self._groups:
            if not names:
                continue
            weights = [local_tensor(self._parameters[name]) for name in names]
            grads = [self._gradient(name) for name in names]
            # The fused kernel takes its divisor in float32 only: too coarse for a float64 run.
            in_kernel = weights[0].dtype != torch.float64
            if not in_kernel:
                torch._foreach_div_(grads, divisor)
            adamw(
                weights,
                grads,
                [self._exp_avg[name] for name in names],
                [self._exp_avg_sq[name] for name in names],
                [],
                [self._steps[name] for name in names],
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=self._cfg.beta1,
                beta2=self._cfg.beta2,
                eps=self._cfg.eps,
                lr=lr,
                weight_decay=weight_decay,
                grad_scale=divisor.float() if in_kernel else None,
                found_inf=skip,
            )

    def _gradient(self, name: str) -> torch.Tensor:
        grad = self._parameters[name].grad
        assert grad is not None, f"no gradient for {name}"
        return local_tensor(grad)

    def zero_grad(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        return [self._gradient(name) for name in self._parameters]

    def state(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        return {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq}

    def step_count(self) -> int:
        return int(next(iter(self._steps.values())).item())

    def set_step_count(self, count: int) -> None:
        for steps in self._steps.values():
            steps.fill_(count)


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """Returns the optimizer that `optim.name` names, over the parameters of `model`; raises ConfigError."""
    optimizer: Optimizer = OPTIMIZERS.get(cfg.name)(model, cfg)
    return optimizer
