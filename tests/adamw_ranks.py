"""What ranks do in the tests of adamw_fused: steps on known gradients or on real ones, saving and loading."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch
from muon_ranks import Tree
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from factory_train import optim_adamw_fused
from factory_train.checkpoint.entries import TensorEntry, training_entries
from factory_train.checkpoint.load import load_checkpoint
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.checkpoint.retention import Retention
from factory_train.checkpoint.save import save_checkpoint
from factory_train.config import OptimConfig
from factory_train.distributed.box import local_tensor
from factory_train.distributed.initialization import initialize_parameters
from factory_train.kernels import block_codes
from factory_train.optim import AdamW, Optimizer, masters_of
from factory_train.optim_adamw_fused import AdamWFused
from factory_train.run_dir import Attempt, RunDir

# Shards of four ranks are whole blocks; uneven over ranks, smaller than the world, one-dimensional.
WHOLE = {"layers.0.wide": (8, 256), "layers.0.tall": (32, 64), "layers.1.wide": (8, 256), "layers.1.tall": (32, 64), "embed": (16, 128)}
UNEVEN = {"layers.0.wide": (5, 70), "layers.0.tall": (90, 4), "layers.0.flat": (2, 600), "layers.0.norm": (60,), "embed": (9, 40)}
FORMATS = {
    "adamw": ("fp32", "fp32"),
    "fp32": ("fp32", "fp32"),
    "split": ("fp32", "split"),
    "bf16": ("bf16", "split"),
    "int8": ("int8", "split"),
}
MAX_NORM, LR = 2.0, 0.02


def draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def model_of(strategy: str, world: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Tree:
    """Returns the module with the initial weights of seed 0, drawn block by block as in training."""
    model = Tree({name: torch.zeros(shape) for name, shape in shapes.items()}).to(dtype)
    if strategy in ("fsdp", "hsdp"):
        sizes, names = ((world,), ("dp_shard",)) if strategy == "fsdp" else ((2, world // 2), ("dp_replicate", "dp_shard"))
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        for layer in model.get_submodule("layers").children():
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    initialize_parameters(model, 0, lambda name: 1.0)
    return model


def optimizer_of(model: nn.Module, kind: str) -> Optimizer:
    state, master = FORMATS[kind]
    cfg = OptimConfig(name="adamw_fused", state=state, master=master, max_grad_norm=MAX_NORM)
    return AdamW(model, cfg) if kind == "adamw" else AdamWFused(model, cfg)


def dtype_of(kind: str) -> torch.dtype:
    return torch.bfloat16 if FORMATS[kind][1] == "split" else torch.float32


def give_gradients(model: nn.Module, shapes: dict[str, tuple[int, ...]], seed: int) -> torch.Tensor:
    """Puts known gradients, of numbers that bfloat16 has, on the parameters; returns their norm."""
    squares = 0.0
    for name, grad in draw(shapes, seed, torch.bfloat16).items():
        parameter = model.get_parameter(name)
        squares += grad.double().square().sum().item()
        grad = grad.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad
    return torch.tensor(math.sqrt(squares), dtype=torch.float64)


def whole_masters(model: nn.Module, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    masters = masters_of(optimizer)
    found = {}
    for name, parameter in model.named_parameters():
        local = masters[name].detach() if name in masters else local_tensor(parameter.detach()).clone()
        if isinstance(parameter, DTensor):
            shape, stride = parameter.shape, parameter.stride()
            local = DTensor.from_local(local, parameter.device_mesh, parameter.placements, shape=shape, stride=stride).full_tensor()
        found[name] = local.clone()
    return found


def steps(rank: int, world: int, strategy: str, shapes: dict, kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Returns the whole float32 weights after each step on known gradients."""
    model = model_of(strategy, world, shapes, dtype_of(kind))
    optimizer = optimizer_of(model, kind)
    history = [whole_masters(model, optimizer)]
    for step in range(count):
        norm = give_gradients(model, shapes, 1 + step)
        optimizer.step(lr=LR / (1 + step), grad_norm=norm, skip=torch.zeros(()))
        optimizer.zero_grad()
        history.append(whole_masters(model, optimizer))
    return history


class _Chain(nn.Module):
    """Two units and a root, whose gradients FSDP2 reduces by unit; `rows` decides whether shards are whole blocks."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, rows, bias=False), nn.Linear(rows, 64, bias=False)) for _ in range(2))
        self.head = nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def train_sharded(rank: int, world: int, rows: int, move: bool) -> tuple[list[torch.Tensor], list[int], bool]:
    """Trains through FSDP2's own gradients; returns weights, how many pieces the gradients came in, and whether weights lie in one buffer.

    `move=False` is torch with other internals.
    """
    torch.manual_seed(0)
    model = _Chain(rows)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("dp_shard",))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with contextlib.nullcontext() if move else mock.patch.object(optim_adamw_fused, "shard_owners", return_value={}):
        optimizer = AdamWFused(model, OptimConfig(name="adamw_fused", state="int8"))
    pieces = []
    for step in range(3):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).square().mean().backward()
        pieces.append(len(optimizer.fused._spans(optimizer.gradients())))
        optimizer.step(lr=1e-2, grad_norm=torch.ones((), dtype=torch.float64), skip=torch.zeros(()))
        optimizer.zero_grad()
    storages = {local_tensor(parameter.detach()).untyped_storage().data_ptr() for parameter in model.parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    # Loading through torch's own hooks leaves the weights where they are.
    model.load_state_dict(state)
    moved = {local_tensor(parameter.detach()).untyped_storage().data_ptr() for parameter in model.parameters()}
    assert moved == storages
    return [parameter.full_tensor().detach() for parameter in model.parameters()], pieces, len(storages) == 1


def entries_of(rank: int, world: int, strategy: str, model: nn.Module, optimizer: Optimizer) -> list[TensorEntry]:
    copies = 1 if strategy == "fsdp" else world
    parameters = dict(model.named_parameters())
    return training_entries(parameters, optimizer.state(), replica_rank=rank % copies, replica_count=copies, masters=masters_of(optimizer))


def save(rank: int, world: int, strategy: str, shapes: dict, attempts: dict[str, Attempt]) -> None:
    """Saves a checkpoint after three steps with each of the optimizers."""
    for kind, attempt in attempts.items():
        model = model_of(strategy, world, shapes, dtype_of(kind))
        optimizer = optimizer_of(model, kind)
        for step in range(3):
            optimizer.step(lr=LR, grad_norm=give_gradients(model, shapes, 1 + step), skip=torch.zeros(()))
        mine = entries_of(rank, world, strategy, model, optimizer)
        save_checkpoint(attempt, 3, mine, {"optimizer_step": 3}, rank=rank, world_size=world, retention=Retention(2))


def load_all(rank: int, world: int, strategy: str, shapes: dict, runs: dict[tuple[str, int], RunDir]) -> list[str]:
    """Loads every checkpoint into every optimizer; returns what is not as it should be.

    Weights and float32 moments are the stored float32, bit for bit; narrower moments are its rounding, with blocks of their own
    shards; and codes that come from the same number of shards are the very codes.
    """
    wrong = []
    for (source, shards), run in runs.items():
        with CheckpointReader(run.checkpoints / "step-00000003") as reader:
            for kind in FORMATS:
                model = model_of(strategy, world, shapes, dtype_of(kind))
                optimizer = optimizer_of(model, kind)
                mine = entries_of(rank, world, strategy, model, optimizer)
                if kind == "int8":
                    # As init_from does: the weights alone.
                    load_checkpoint(reader, mine, sections=("weights",))
                    if any(entry.section != "weights" and bool(entry.tensor.detach().any()) for entry in mine):
                        wrong.append(f"{source} of {shards} -> {kind}: more than the weights")
                loaded = load_checkpoint(reader, mine)
                native = any(section.startswith("native/") for section in loaded.sections)
                if native != (source == kind == "int8" and shards == world) or not loaded.has_optimizer:
                    wrong.append(f"{source} of {shards} -> {kind}: sections {loaded.sections}")
                for entry in mine:
                    if entry.section.startswith("native/"):
                        if native and not torch.equal(reader.read_box(entry.section, entry.name, entry.box), entry.tensor):
                            wrong.append(f"{source} of {shards} -> {kind}: {entry.key}")
                        continue
                    stored = reader.read_box(entry.section, entry.name, entry.box)
                    expected = _rounded(stored, kind, entry.section)
                    if stored.dtype != torch.float32 or not torch.equal(entry.tensor.detach(), expected):
                        wrong.append(f"{source} of {shards} -> {kind}: {entry.key}")
                    if native and not torch.equal(expected, stored):
                        wrong.append(f"{source} of {shards} -> {kind}: {entry.key} changed by rounding")
    return wrong


def _rounded(values: torch.Tensor, kind: str, section: str) -> torch.Tensor:
    if section == "weights" or FORMATS[kind][0] == "fp32":
        return values
    if FORMATS[kind][0] == "bf16":
        return values.bfloat16().float()
    rows = block_codes.in_blocks(values)
    if section == "optimizer/exp_avg":
        again = block_codes.decode_signed(*block_codes.encode_signed(rows))
    else:
        again = block_codes.decode_root(*block_codes.encode_root(block_codes.exact_sqrt(rows)))
    return again.view(-1)[: values.numel()].view(values.shape)
