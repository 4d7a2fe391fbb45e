"""What ranks do in the checkpoint tests: build a small state under a strategy, save it, load it, compare it."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from factory_train.checkpoint import entries
from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.arena import Arena
from factory_train.checkpoint.entries import TensorEntry
from factory_train.checkpoint.failure import describe
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.load import LoadedState, load_newest
from factory_train.checkpoint.retention import Retention
from factory_train.checkpoint.save import save_checkpoint
from factory_train.checkpoint.saver import Saver
from factory_train.checkpoint.writer import Answer, Writer, WriterProcess, carry_out
from factory_train.config import CheckpointConfig
from factory_train.distributed.box import Box, local_box, local_tensor
from factory_train.errors import CheckpointError, FactoryTrainError
from factory_train.run_dir import Attempt, RunDir

# So small that every tensor here is cut into several chunks.
entries.MAX_CHUNK_BYTES = 40

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
    mine = entries_of(spread_state(strategy, reference(seed)))
    facts = state or {"step": step, "seed": seed}
    return save_checkpoint(attempt, step, mine, facts, rank=rank, world_size=world, retention=Retention(keep_last), files=files).name


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


class ThreadWriter:
    """Carries out a saver's orders in a thread, so that a test can stop it at any point; it dies as the process would."""

    def __init__(self, arena: Arena, files: DurableFiles) -> None:
        self._arena, self._files = arena, files
        self._answer: Answer | None = None
        self._thread: threading.Thread | None = None

    def order(self, order: Mapping[str, Any]) -> None:
        self._answer = None
        thread = threading.Thread(target=self._work, args=(order,), daemon=True)
        thread.start()
        self._thread = thread

    def _work(self, order: Mapping[str, Any]) -> None:
        try:
            # As it would arrive over the pipe.
            self._answer = carry_out(json.loads(json.dumps(order)), self._arena.view(), self._files)
        except Crash:
            self._answer = Answer({}, describe(CheckpointError("the writer died"), "writing", 0), 0.0)

    def answer(self, timeout_s: float | None) -> Answer | None:
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._answer

    def close(self) -> None:
        if self._thread is not None:
            self._thread.join()


def crashing(crash_at: int | None, points: list[tuple[str, str, str]]) -> Callable[[str, str, Path], None]:
    """Returns a hook that lists the moments of a save, and dies at the given one, for good."""

    def hook(when: str, action: str, path: Path) -> None:
        points.append((when, action, path.name))
        if crash_at is not None and len(points) > crash_at:
            raise Crash

    return hook


def save_to_the_point(
    rank: int, world: int, strategy: str, mode: str, attempt: Attempt, step: int, crash: tuple[int, int] | None
) -> tuple[str, list[tuple[str, str, str]]]:
    """Saves while one rank, or its writer, dies at a moment.

    Args:
        crash: (rank, number of the moment).

    Returns:
        How the save ended on this rank, and the moments there were.
    """
    points: list[tuple[str, str, str]] = []
    files = DurableFiles(crashing(crash[1] if crash and crash[0] == rank else None, points))
    try:
        if mode == "sync":
            save(rank, world, strategy, attempt, step, step, files=files)
        else:
            with contextlib.closing(make_saver(rank, world, attempt, lambda arena: ThreadWriter(arena, files))) as saver:
                begin_beside(saver, strategy, step)
                agree_on_progress(saver, step, world)
                saver.finish()
    except Crash:
        return "crash", points
    except RuntimeError:
        # gloo, when the peer's sockets close.
        return "lost its peer", points
    except FactoryTrainError as error:
        return type(error).__name__, points
    return "done", points


def make_saver(rank: int, world: int, attempt: Attempt, start_writer: Callable[[Arena], Writer] = WriterProcess, **kwargs: Any) -> Saver:
    """Returns an asynchronous saver that keeps two checkpoints; `events` takes what it records."""
    events = kwargs.pop("events", [])
    cfg = CheckpointConfig(**{"mode": "async", "keep_last": 2, **kwargs})
    record = lambda kind, **facts: events.append((kind, facts))  # noqa: E731
    return Saver(attempt, cfg, Ranks(rank, world), torch.device("cpu"), record, start_writer=start_writer)


def _native(like: torch.Tensor) -> TensorEntry:
    """Returns 8-bit codes cut like a parameter: an encoding that only the optimizer that made it understands."""
    box, shape = local_box(like)
    codes = torch.arange(like.numel(), dtype=torch.int8).reshape(shape)[box.slices(Box.whole(shape))].clone()
    return TensorEntry("embed", "native/codes", codes, box, shape)


def save_with_native(rank: int, world: int, strategy: str, attempt: Attempt) -> None:
    state = spread_state(strategy, reference(1))
    mine = [*entries_of(state), _native(state["weights", "embed"])]
    save_checkpoint(attempt, 1, mine, {"seed": 1}, rank=rank, world_size=world, retention=Retention(2))


def load_with_native(rank: int, world: int, strategy: str, run: RunDir) -> tuple[bool, list[str]]:
    """Returns whether the native encoding was taken, and what differs from what was saved."""
    state = spread_state(strategy, {key: torch.zeros_like(value) for key, value in reference(0).items()})
    native = _native(state["weights", "embed"])
    expected = native.tensor.clone()
    native.tensor.zero_()
    loaded = load_newest(run, [*entries_of(state), native], rank=rank, world_size=world)
    assert loaded is not None
    taken = "native/codes" in loaded.sections
    assert torch.equal(native.tensor, expected if taken else torch.zeros_like(expected))
    return taken, differences(state, reference(1))


def save_three_beside(rank: int, world: int, strategy: str, attempt: Attempt) -> list[tuple[str, dict[str, Any]]]:
    """Saves steps 1 to 3 beside training, with a real writer process; every state is changed as soon as that is allowed."""
    events: list[tuple[str, dict[str, Any]]] = []
    with contextlib.closing(make_saver(rank, world, attempt, events=events)) as saver:
        for step in (1, 2, 3):
            begin_beside(saver, strategy, step)
            if step == 2:
                agree_on_progress(saver, step, world)
        saver.finish()
    return events


def save_until(rank: int, world: int, strategy: str, attempt: Attempt, seconds: float) -> int:
    """Saves again and again, beside training and keeping the newest alone; returns how often. Steps begin with 2.

    It ends after so many seconds, but not before the file `enough` is in the run's folder.
    """
    deadline, step = time.monotonic() + seconds, 1
    with contextlib.closing(make_saver(rank, world, attempt, keep_last=1)) as saver:
        while True:
            late = torch.tensor([float(time.monotonic() > deadline and (attempt.run.path / "enough").exists())])
            torch.distributed.all_reduce(late)
            if late.item():
                break
            step += 1
            begin_beside(saver, strategy, step)
            agree_on_progress(saver, step, world)
        saver.finish()
    return step - 1


def save_beside_with_failure(rank: int, world: int, strategy: str, attempt: Attempt, failing_rank: int) -> tuple[str, list]:
    """Saves step 1 while the disk of one rank is full, then step 2; returns what the first raised, and the events."""
    events: list[tuple[str, dict[str, Any]]] = []
    full = [rank == failing_rank]

    def hook(when: str, action: str, path: Path) -> None:
        if full[0] and action == "write":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    raised = ""
    with contextlib.closing(
        make_saver(rank, world, attempt, lambda arena: ThreadWriter(arena, DurableFiles(hook)), events=events)
    ) as saver:
        for step in (1, 2):
            begin_beside(saver, strategy, step)
            try:
                saver.finish()
            except CheckpointError as error:
                raised = str(error)
            full[0] = False
    return raised, events


def spoil(state: dict[tuple[str, str], torch.Tensor]) -> None:
    """Changes all of a state in place, as an optimizer step would."""
    with torch.no_grad():
        for tensor in state.values():
            local_tensor(tensor).fill_(1)


def begin_beside(saver: Saver, strategy: str, step: int) -> None:
    """Begins to save `reference(step)`, and changes the state as soon as that is allowed."""
    state = spread_state(strategy, reference(step))
    saver.begin(step, entries_of(state), {"step": step, "seed": step})
    saver.before_update()
    spoil(state)


def agree_on_progress(saver: Saver, step: int, world: int, tries: int = 2000) -> None:
    """Does what the reduction of the following steps does, until the save is being committed or has failed."""
    for number in range(1, tries):
        counts = torch.tensor([float(flag) for flag in saver.progress()])
        if world > 1:
            torch.distributed.all_reduce(counts)
        saver.agreed(step + number, int(counts[0]), int(counts[1]))
        if int(counts.sum()) == world:
            return
        time.sleep(0.002)
    raise AssertionError("the writers never ended")


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
