"""How a model is spread over ranks: the one place that states the order."""

# No postponed annotations here: DDP compares those of a communication hook with the classes themselves.

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from factory_train.config import Config
from factory_train.distributed.initialization import initialize_parameters


class ParallelModel:
    """A model as the trainer sees it: forward, gradient synchronisation, and the bare module for names.

    Gradients are summed over data-parallel ranks, never averaged: the loss is divided by the target tokens of the
    whole step beforehand.

    Args:
        module: the bare model; parameter names are those of the single-process model under every strategy.
        forward: what to call for a forward pass.
        grad_copies: how many ranks hold the same gradient shard once gradients are reduced.
        autocast: compute type of the forward pass where parameters are kept in another one, else None.
    """

    def __init__(self, module: nn.Module, forward: nn.Module, grad_copies: int, autocast: torch.dtype | None) -> None:
        self.module, self.grad_copies = module, grad_copies
        self._forward, self._autocast = forward, autocast

    def __call__(self, tokens_BT: torch.Tensor, *more: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
        """Returns logits of shape (batch, time, vocabulary), or what `head` makes of the hidden states inside of the forward pass."""
        options = {} if head is None else {"head": head}
        with torch.autocast(tokens_BT.device.type, dtype=self._autocast, enabled=self._autocast is not None):
            return self._forward(tokens_BT, *more, **options)

    @contextlib.contextmanager
    def gradient_sync(self, enabled: bool) -> Iterator[None]:
        """Reduces gradients in the backward passes inside, or (accumulation) leaves that to a later one."""
        if isinstance(self._forward, FSDPModule):
            self._forward.set_requires_gradient_sync(enabled)
            self._forward.set_is_last_backward(enabled)
        if isinstance(self._forward, DistributedDataParallel) and not enabled:
            with self._forward.no_sync():
                yield
        else:
            yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Runs forward passes that no backward pass follows."""
        self.module.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train()
            if isinstance(self._forward, FSDPModule):
                # Normally the backward pass frees the root's gathered parameters; here there was none.
                self._forward.reshard()


def parallelize(model: nn.Module, mesh: DeviceMesh, cfg: Config, device: torch.device) -> ParallelModel:
    """Spreads a model built on the meta device over `mesh` and gives it its initial weights.

    The order is: master precision, activation checkpointing, compile, then FSDP2 / HSDP or DDP, and weights last, so
    that no rank ever holds more than its share.

    Args:
        model: has `layers`, `init_buffers(device)` and `initial_std(name)`.
        mesh: axes dp_replicate and dp_shard.
    """
    params, compute = parameter_dtype(cfg), getattr(torch, cfg.precision.compute)
    model.to(params)
    layers = list(model.get_submodule("layers").children())
    if cfg.parallel.activation_checkpoint == "full":
        for layer in layers:
            # Wrapping the method instead of the module keeps parameter names as they are.
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    if cfg.parallel.compile:
        for layer in layers:
            layer.compile()
    if cfg.parallel.strategy == "fsdp":
        _fully_shard(model, layers, mesh, cfg)
    model.to_empty(device=device)
    model.init_buffers(device)  # type: ignore[operator]
    initialize_parameters(model, cfg.train.seed, model.initial_std)  # type: ignore[arg-type]
    if cfg.parallel.strategy == "fsdp":
        return ParallelModel(model, model, mesh["dp_replicate"].size(), None)
    autocast = compute if compute != params else None
    if cfg.parallel.strategy == "single":
        return ParallelModel(model, model, 1, autocast)
    # Buffers are computed alike on every rank; torch 2.13 renamed the switch that stops sending them at every forward pass.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    no_buffer_sync: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    devices = [device] if device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True, **no_buffer_sync)
    ddp.register_comm_hook(torch.promote_types(params, getattr(torch, cfg.precision.reduce)), _sum_gradients)
    return ParallelModel(model, ddp, mesh.size(), autocast)


def parameter_dtype(cfg: Config) -> torch.dtype:
    """Returns the type parameters have in the model: that of the master, or the upper half of a split one."""
    return torch.bfloat16 if cfg.optim.master == "split" else getattr(torch, cfg.precision.params)


def _fully_shard(model: nn.Module, layers: list[nn.Module], mesh: DeviceMesh, cfg: Config) -> None:
    params, compute, reduce = parameter_dtype(cfg), getattr(torch, cfg.precision.compute), getattr(torch, cfg.precision.reduce)
    policy = MixedPrecisionPolicy(
        param_dtype=compute if compute != params else None,
        reduce_dtype=reduce if reduce != compute else None,
        # Logits leave the model as they are; the loss promotes them itself.
        output_dtype=None,
    )
    # A one-dimensional mesh is plain FSDP2; two dimensions are HSDP (replicate, shard).
    fsdp_mesh = mesh if mesh["dp_replicate"].size() > 1 else mesh["dp_shard"]
    for module in (*layers, model):
        reshard = cfg.parallel.reshard_after_forward and module is not model
        sharded = fully_shard(module, mesh=fsdp_mesh, mp_policy=policy, reshard_after_forward=reshard)
        sharded.set_gradient_divide_factor(1.0)
        # Without this a factor of one is a pre-multiplied sum, which gloo does not have.
        sharded.set_force_sum_reduction_for_comms(True)


def _sum_gradients(dtype: torch.dtype, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP communication hook: the sum, where DDP alone would divide by the world size; summed in `dtype`, kept as it came."""
    gradients = bucket.buffer()
    reduced = dist.all_reduce(gradients.to(dtype), async_op=True)
    return reduced.get_future().then(lambda future: future.value()[0].to(gradients.dtype))
