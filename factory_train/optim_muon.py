"""Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from factory_train.config import OptimConfig
from factory_train.distributed.box import local_tensor
from factory_train.distributed.matrix_exchange import MatrixExchange
from factory_train.kernels.muon import muon_apply, muon_momentum, orthogonalize
from factory_train.optim import AdamW

# Root mean square of an AdamW update, which Muon's is brought to.
_ADAMW_RMS = 0.2


def takes_muon(name: str, parameter: Tensor) -> bool:
    """Returns whether a parameter is a matrix of a layer; embeddings, head, norms and biases are AdamW's."""
    return parameter.ndim == 2 and name.startswith("layers.")


def update_scale(rows: int, columns: int) -> float:
    """Returns what an orthogonalised update is multiplied by: 0.2 sqrt(max(rows, columns)).

    An orthogonal matrix has a root mean square of 1 / sqrt(max(rows, columns)), an AdamW update about 0.2; so one learning
    rate and one weight decay, those of AdamW, serve both (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    return _ADAMW_RMS * math.sqrt(max(rows, columns))


class Muon:
    """Muon (Jordan et al. 2024; scaled as by Liu et al. 2025), behind the same seam as `AdamW`.

    The Nesterov momentum of each matrix is orthogonalised by the Polar Express iteration, on one of the data-parallel
    ranks, and every rank then has the same result, bit for bit. Matmuls are in bf16 on cards, in the parameters' type on CPUs.

    Args:
        model: its parameters may be plain tensors or DTensors.
        cfg: `momentum` and `ns_steps`; lr, weight decay and clipping are for all parameters, betas and eps for AdamW's.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig) -> None:
        self._cfg = cfg
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self._matrices = {name: parameter for name, parameter in trained.items() if takes_muon(name, parameter)}
        self._adamw = AdamW(model, cfg, names=trained.keys() - self._matrices.keys())
        shards = {name: local_tensor(parameter.detach()) for name, parameter in self._matrices.items()}
        self._momentum = {name: torch.zeros_like(shard) for name, shard in shards.items()}
        self._exchange: MatrixExchange | None = None
        if shards:
            shard = next(iter(shards.values()))
            dtype = torch.bfloat16 if shard.is_cuda and shard.dtype != torch.float64 else shard.dtype
            self._exchange = MatrixExchange(self._matrices, dtype, shard.device)

    @torch.no_grad()
    def step(self, *, lr: float, grad_norm: Tensor, skip: Tensor) -> None:
        max_norm = self._cfg.max_grad_norm
        divisor = (grad_norm / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(grad_norm)
        if self._exchange is not None:
            for name, momentum in self._momentum.items():
                update = self._exchange.shards[name]
                muon_momentum(momentum, self._gradient(name), update, divisor, skip, self._cfg.momentum)
            self._exchange.transform(lambda x_LMN: orthogonalize(x_LMN, self._cfg.ns_steps))
            for name, parameter in self._matrices.items():
                rate = lr * update_scale(parameter.shape[0], parameter.shape[1])
                muon_apply(local_tensor(parameter), self._exchange.shards[name], skip, 1.0 - lr * self._cfg.weight_decay, rate)
        self._adamw.step(lr=lr, grad_norm=grad_norm, skip=skip)

    def _gradient(self, name: str) -> Tensor:
        grad = self._matrices[name].grad
        assert grad is not None, f"no gradient for {name}"
        return local_tensor(grad)

    def zero_grad(self) -> None:
        for parameter in self._matrices.values():
            parameter.grad = None
        self._adamw.zero_grad()

    def gradients(self) -> list[Tensor]:
        return [*map(self._gradient, self._matrices), *self._adamw.gradients()]

    def state(self) -> Mapping[str, Mapping[str, Tensor]]:
        return {"momentum": self._momentum, **self._adamw.state()}

    def step_count(self) -> int:
        return self._adamw.step_count()

    def set_step_count(self, count: int) -> None:
        self._adamw.set_step_count(count)
