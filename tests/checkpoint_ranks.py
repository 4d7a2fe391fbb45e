"""What ranks do in the checkpoint tests: build a small state under a strategy, save it, load it, compare it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from factory_train.checkpoint.entries import TensorEntry
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.load import LoadedState, load_newest
from factory_train.checkpoint.retention import Retention
from factory_train.checkpoint.save import save_checkpoint
from factory_train.distributed.box import local_box, local_tensor
from factory_train.errors import FactoryTrainError
from factory_train.run_dir import Attempt, RunDir

# Uneven over 2 and 4 ranks, smaller than the world, one-dimensional.
SHAPES = {"embed": (9, 4), "wide": (5, 7), "norm": (6,), "pair": (2, 3, 2), "single": (1, 4), "bias": (3,)}
SECTIONS = ("weights", "optimizer/exp_avg", "optimizer/exp_avg_sq")
STRATEGIES = {"single": 1, "ddp2": 2, "fsdp2": 2, "ddp4": 4, "fsdp4": 4, "hsdp4": 4}


class Crash(BaseException):
    """The process ends here, as far as the code under test can tell."""


def reference(seed: int) -> dict[tuple[str, str], torch.Tensor]:
    """Returns the whole state by (section, name): every type of the format, scalars and empty tensors."""
    generator = torch.Generator().manual_seed(seed)
    values = {(section, name): torch.randn(shape, generator=generator) for section in SECTIONS for name, shape in SHAPES.items()}
    values["weights", "scale"] = torch.randn((), generator=generator, dtype=torch.float64)
    values["weights", "half"] = torch.randn(5, 3, generator=generator).bfloat16()
    values["weights", "counts"] = torch.randint(-(2**60), 2**60, (7,), generator=generator)
    values["weights", "nothing"] = torch.zeros(0, 4)
    return values


def spread_state(strategy: str, values: dict[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """Returns the state as tensors or DTensors of this rank, placed by torch itself."""
    if not strategy.startswith(("fsdp", "hsdp")):
        return {key: value.clone() for key, value in values.items()}
    world = STRATEGIES[strategy]
    shape, names = ((2, 2), ("dp_replicate", "dp_shard")) if strategy == "hsdp4" else ((world,), ("dp_shard",))
    module = nn.ParameterDict({name: nn.Parameter(values["weights", name].clone()) for name in SHAPES})
    fully_shard(module, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
    parameters = dict(module.named_parameters())
    state: dict[tuple[str, str], torch.Tensor] = {}
    for (section, name), value in values.items():
        if section == "weights":
            state[section, name] = parameters.get(name, value.clone())
        else:
            like = parameters[name]
            state[section, name] = distribute_tensor(value, like.device_mesh, like.placements)
    return state


def entries_of(state: dict[tuple[str, str], torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry.of(section, name, tensor) for (section, name), tensor in state.items()]


def differences(state: dict[tuple[str, str], torch.Tensor], expected: dict[tuple[str, str], torch.Tensor]) -> list[str]:
    """Returns the tensors that are not bit-equal, put together by torch where they are sharded."""
    whole = {key: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for key, tensor in state.items()}
    return [" ".join(key) for key in expected if not torch.equal(whole[key].detach(), expected[key])]


def save(
    rank: int,
    world: int,
    strategy: str,
    attempt: Attempt,
    step: int,
    seed: int,
    *,
    keep_last: int = 2,
    files: DurableFiles | None = None,
    state: dict | None = None,
) -> str:
    """Saves `reference(seed)`; returns the folder's name."""
    entries = entries_of(spread_state(strategy, reference(seed)))
    facts = state or {"step": step, "seed": seed}
    return save_checkpoint(attempt, step, entries, facts, rank=rank, world_size=world, retention=Retention(keep_last), files=files).name


def load(rank: int, world: int, strategy: str, run: RunDir) -> tuple[LoadedState | None, dict[tuple[str, str], torch.Tensor]]:
    """Loads the newest checkpoint into zeros."""
    state = spread_state(strategy, {key: torch.zeros_like(value) for key, value in reference(0).items()})
    return load_newest(run, entries_of(state), rank=rank, world_size=world), state


def load_and_compare(rank: int, world: int, strategy: str, runs: list[RunDir]) -> list[str]:
    """Returns what differs from what was saved, over several runs."""
    found = []
    for run in runs:
        loaded, state = load(rank, world, strategy, run)
        assert loaded is not None
        found += [f"{run.name}: {name}" for name in differences(state, reference(loaded.state["seed"]))]
    return found


def load_notes(rank: int, world: int, strategy: str, run: RunDir) -> tuple[int, list[str], list[str]]:
    """Returns the step found, the notes, and what differs."""
    loaded, state = load(rank, world, strategy, run)
    assert loaded is not None
    return loaded.step, list(loaded.notes), differences(state, reference(loaded.state["seed"]))


def save_with_failure(rank: int, world: int, attempt: Attempt, failing_rank: int, action: str, error: Exception) -> tuple[str, str]:
    """Saves while one rank fails at its first `action`; returns what the rank raised."""

    def hook(when: str, did: str, path: Path) -> None:
        if rank == failing_rank and did == action:
            raise error

    try:
        save(rank, world, "fsdp2", attempt, 2, 2, files=DurableFiles(hook))
    except FactoryTrainError as raised:
        return type(raised).__name__, str(raised)
    return "", ""


def save_with_crash(rank: int, world: int, attempt: Attempt, crashing_rank: int, moment: tuple[str, str]) -> str:
    """Saves while one rank dies at a moment; returns how the save ended on this rank."""

    def hook(when: str, did: str, path: Path) -> None:
        if rank == crashing_rank and (when, did) == moment:
            raise Crash

    try:
        save(rank, world, "fsdp2", attempt, 2, 2, files=DurableFiles(hook))
    except Crash:
        return "crash"
    except RuntimeError:
        # gloo, when the peer's sockets close.
        return "lost its peer"
    return "done"


def without_pickle(rank: int, world: int, attempt: Attempt) -> list[str]:
    """Saves and loads while everything that unpickles raises."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something was unpickled")

    with contextlib.ExitStack() as stack:
        targets: list[tuple[object, str]] = [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]
        for owner, name in targets:
            stack.enter_context(mock.patch.object(owner, name, refuse))
        save(rank, world, "fsdp2", attempt, 1, 1)
        return load_and_compare(rank, world, "fsdp2", [attempt.run])


def tiles(rank: int, world: int, strategy: str) -> list[tuple[str, tuple, tuple, bool]]:
    """Returns (name, offset, shape, values are those of the box) of every sharded parameter of this rank."""
    values = reference(3)
    state = spread_state(strategy, values)
    found = []
    for name in SHAPES:
        box, shape = local_box(state["weights", name])
        part = values["weights", name][tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))]
        found.append(
            (name, box.offset, box.shape, shape == SHAPES[name] and torch.equal(local_tensor(state["weights", name]).detach(), part))
        )
    return found


def counting(points: list[tuple[str, str, str]]) -> Callable[[str, str, Path], None]:
    """Returns a hook that lists the moments of a save."""
    return lambda when, action, path: points.append((when, action, path.name))
