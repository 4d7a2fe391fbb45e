"""What ranks do in Muon's tests: the same steps under a strategy, and what each rank ends with."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from factory_train.config import OptimConfig
from factory_train.distributed.matrix_exchange import MatrixExchange
from factory_train.optim_muon import Muon

# Tall, wide, fewer rows than ranks, equal shapes; the rest is AdamW's.
SHAPES = {
    **{f"layers.{i}.wide": (5, 7) for i in range(3)},
    **{f"layers.{i}.tall": (9, 4) for i in range(3)},
    "layers.0.flat": (2, 6),
    "layers.0.norm": (6,),
    "embed": (9, 4),
}


class Tree(nn.Module):
    """A module with parameters of given dotted names."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            module: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(last, nn.Parameter(value.clone()))


def draw(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def model_of(strategy: str, world: int, dtype: torch.dtype) -> Tree:
    model = Tree(draw(0, dtype))
    if strategy == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",)))
    if strategy == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp_replicate", "dp_shard")))
    return model


def steps(rank: int, world: int, strategy: str, dtype: torch.dtype, count: int = 3) -> dict[str, torch.Tensor]:
    """Returns the whole weights and momenta after `count` steps on known gradients."""
    model = model_of(strategy, world, dtype)
    optimizer = Muon(model, OptimConfig(name="muon", max_grad_norm=2.0))
    for step in range(count):
        for name, grad in draw(1 + step, dtype).items():
            parameter = model.get_parameter(name)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step(lr=0.02, grad_norm=torch.tensor(3.0, dtype=torch.float64), skip=torch.zeros(()))
    return {name: _whole(parameter) for name, parameter in model.named_parameters()}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def marked_by_owner(rank: int, world: int, strategy: str) -> dict[str, torch.Tensor]:
    """Returns the shards' whole matrices after each owner has added 100 (its rank + 1) to what it was sent."""
    model = model_of(strategy, world, torch.float32)
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    exchange = MatrixExchange(matrices, torch.float32, torch.device("cpu"))
    for name, parameter in matrices.items():
        exchange.shards[name].copy_(parameter.detach().to_local() if isinstance(parameter, DTensor) else parameter.detach())
    exchange.transform(lambda x: x + 100 * (rank + 1))
    found = {}
    for name, parameter in matrices.items():
        shard = exchange.shards[name]
        if isinstance(parameter, DTensor):
            shape, stride = parameter.shape, parameter.stride()
            shard = DTensor.from_local(shard, parameter.device_mesh, parameter.placements, shape=shape, stride=stride).full_tensor()
        found[name] = shard.clone()
    return found
