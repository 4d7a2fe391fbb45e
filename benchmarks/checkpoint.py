"""Saving and loading a checkpoint against PyTorch's own ways, on the same state in one process.

    python benchmarks/checkpoint.py [GiB of state] [rounds] [folder]

The state is what an AdamW run holds: float32 weights and two moments. Measured for each way, in turn, round by round:

- stall: how much longer a loop of training steps takes because of one save at its start, over the mean of the same loop
  without one before and after; and the part of it in which the loop was blocked. A step is matrix multiplications and
  then an update of every tensor; on a machine without spare cores writing beside them slows them down.
- total: a save with nothing beside it, until the checkpoint is on disk (all of them fsync). The one before is removed
  when the new one is complete, never earlier.
- load: the whole state into existing tensors, read in full; ours compares every byte with its checksum first. The page
  cache is warm for all of them, so this is the cost of the method and not of the disk.
- memory: what the way needs at its peak over the state itself, other processes included, shared memory counted once.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.entries import TensorEntry
from factory_train.checkpoint.load import load_newest
from factory_train.checkpoint.saver import Saver
from factory_train.config import CheckpointConfig, Config
from factory_train.run_dir import RunDir

SECTIONS = ("weights", "optimizer/exp_avg", "optimizer/exp_avg_sq")
# A loop of about this long outlives a save, so that what writing costs training is all in it.
LOOP_S = 8.0
WIDTH = 1024


def make_state(gib: float) -> dict[str, torch.Tensor]:
    """Returns tensors of the sizes of a Llama's layers until they are `gib` GiB."""
    shapes = [(2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 5632), (2048, 5632), (5632, 2048), (2048,), (2048,)]
    state: dict[str, torch.Tensor] = {}
    layer = 0
    while sum(tensor.nbytes for tensor in state.values()) < gib * 2**30:
        for index, shape in enumerate(shapes):
            for section in SECTIONS:
                state[f"{section}/layers.{layer}.{index}"] = torch.randn(shape)
        layer += 1
    return state


class Training:
    """A loop of steps over a state: compute that leaves it alone, then an update that changes all of it."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self._a = torch.randn(WIDTH, WIDTH)
        self.step()
        began = time.perf_counter()
        self.step()
        self.steps_per_loop = max(4, round(LOOP_S / (time.perf_counter() - began)))

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        for _ in range(8):
            self._a @ self._a
        before_update()
        # What a fused optimizer costs: one pass over the state.
        torch._foreach_add_(list(self.state.values()), 1e-6)


class Peak:
    """The most memory that this process and its children held while the block ran, shared pages counted once."""

    def __enter__(self) -> Peak:
        self.bytes, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.05):
            self.bytes = max(self.bytes, memory_now())


def memory_now() -> int:
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            # Proportional set size: a page that two processes share counts half in each.
            total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total


class Way:
    """One way to save and load."""

    name = ""
    verified = False

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        self.folder, self.state = folder, state

    def save(self) -> None:
        """Starts a save; returns when training may go on."""
        raise NotImplementedError

    def before_update(self) -> None:
        """Returns when the state may change."""

    def step_done(self) -> None:
        """Called after each step."""

    def wait(self) -> None:
        """Returns when the save is over."""

    def load(self, target: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what was started."""


class TorchSave(Way):
    name = "torch.save"
    number = 0

    def save(self) -> None:
        self.number += 1
        with open(self.folder / f"{self.number}.pt", "wb") as file:
            torch.save(self.state, file)
            file.flush()
            os.fsync(file.fileno())
        (self.folder / f"{self.number - 1}.pt").unlink(missing_ok=True)

    def load(self, target: dict[str, torch.Tensor]) -> None:
        loaded = torch.load(self.folder / f"{self.number}.pt", weights_only=True)
        for name, tensor in target.items():
            tensor.copy_(loaded[name])


class DcpSync(Way):
    name = "DCP sync"
    number = 0

    def save(self) -> None:
        self.number += 1
        dcp.save(self.state, checkpoint_id=self.folder / str(self.number))
        self.remove_previous()

    def remove_previous(self) -> None:
        shutil.rmtree(self.folder / str(self.number - 1), ignore_errors=True)

    def load(self, target: dict[str, torch.Tensor]) -> None:
        dcp.load(dict(target), checkpoint_id=self.folder / str(self.number))


class DcpThread(DcpSync):
    name = "DCP async thread"
    kind = AsyncCheckpointerType.THREAD

    def save(self) -> None:
        self.number += 1
        response = dcp.async_save(self.state, checkpoint_id=self.folder / str(self.number), async_checkpointer_type=self.kind)
        self._future: Any = getattr(response, "upload_completion", response)

    def wait(self) -> None:
        self._future.result()
        self.remove_previous()


class DcpProcess(DcpThread):
    name = "DCP async process"
    kind = AsyncCheckpointerType.PROCESS


class Ours(Way):
    name, mode, verified = "factory_train async", "async", True

    def __init__(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        super().__init__(folder, state)
        self.attempt = RunDir.create(folder, "bench", self.mode).new_attempt(Config(recipe="bench"))
        self.events: list[tuple[str, dict[str, Any]]] = []
        cfg = CheckpointConfig(mode=self.mode, keep_last=1)
        record = lambda kind, **facts: self.events.append((kind, facts))  # noqa: E731
        self.saver = Saver(self.attempt, cfg, Ranks.current(), torch.device("cpu"), record)
        self.entries = entries(state)
        self.saver.prepare(self.entries)
        self.step = 0

    def save(self) -> None:
        self.step += 1
        self.saver.begin(self.step, self.entries, {"step": self.step})

    def before_update(self) -> None:
        self.saver.before_update()

    def step_done(self) -> None:
        # What the reduction of a step does in the trainer.
        written, failed = self.saver.progress()
        self.saver.agreed(self.step + 1, int(written), int(failed))

    def wait(self) -> None:
        self.saver.finish()

    def load(self, target: dict[str, torch.Tensor]) -> None:
        assert load_newest(self.attempt.run, entries(target)) is not None

    def close(self) -> None:
        self.saver.close()


class OursSync(Ours):
    name, mode = "factory_train sync", "sync"


def entries(state: dict[str, torch.Tensor]) -> list[TensorEntry]:
    split = [(name.rpartition("/layers."), tensor) for name, tensor in state.items()]
    return [TensorEntry.of(section, f"layers.{name}", tensor) for (section, _, name), tensor in split]


def loop(training: Training, way: Way | None, blocked: list[float]) -> float:
    """Runs the steps, with a save at the start if there is a way; returns seconds."""
    began = time.perf_counter()
    if way is not None:
        way.save()
        blocked[0] += time.perf_counter() - began

    def before_update() -> None:
        if way is not None:
            start = time.perf_counter()
            way.before_update()
            blocked[0] += time.perf_counter() - start

    for _ in range(training.steps_per_loop):
        training.step(before_update)
        if way is not None:
            way.step_done()
    return time.perf_counter() - began


def measure(way: Way, training: Training, target: dict[str, torch.Tensor]) -> dict[str, float]:
    plain, blocked = loop(training, None, [0.0]), [0.0]
    with_save = loop(training, way, blocked)
    way.wait()
    plain = (plain + loop(training, None, [0.0])) / 2
    total = save_alone(way)
    for tensor in target.values():
        tensor.zero_()
    began = time.perf_counter()
    way.load(target)
    load = time.perf_counter() - began
    assert all(torch.equal(way.state[name], target[name]) for name in target), way.name
    return {"stall_s": with_save - plain, "blocked_s": blocked[0], "total_s": total, "load_s": load}


def save_alone(way: Way) -> float:
    began = time.perf_counter()
    way.save()
    way.before_update()
    way.wait()
    return time.perf_counter() - began


def main() -> None:
    """Prints a table and the same as one line of JSON."""
    gib = float(sys.argv[1]) if len(sys.argv) > 1 else 2.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    root = Path(tempfile.mkdtemp(dir=sys.argv[3] if len(sys.argv) > 3 else None))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        results = run(gib, rounds, root)
    finally:
        dist.destroy_process_group()
        shutil.rmtree(root)
    print(json.dumps({"gib": gib, "rounds": rounds, "torch": torch.__version__, "cores": os.cpu_count(), "results": results}))


def run(gib: float, rounds: int, root: Path) -> dict[str, dict[str, float]]:
    state = make_state(gib)
    size = sum(tensor.nbytes for tensor in state.values())
    training, target = Training(state), {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    ways: list[Way] = []
    loop(training, None, [0.0])
    results: dict[str, dict[str, list[float]]] = {}
    for kind in (TorchSave, DcpSync, DcpThread, DcpProcess, OursSync, Ours):
        before = memory_now()
        folder = root / kind.__name__
        folder.mkdir()
        ways.append(kind(folder, state))
        with Peak() as peak:
            save_alone(ways[-1])
        results[ways[-1].name] = {"memory_bytes": [peak.bytes - before]}
        measure(ways[-1], training, target)
    for number in range(rounds):
        # Whoever goes first changes.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            for figure, value in measure(way, training, target).items():
                results[way.name].setdefault(figure, []).append(value)
    for way in ways:
        way.close()
    medians = {name: {figure: statistics.median(values) for figure, values in figures.items()} for name, figures in results.items()}
    show(medians, size)
    return medians


def show(medians: dict[str, dict[str, float]], size: int) -> None:
    print(f"{size / 2**30:.2f} GiB, {torch.get_num_threads()} threads, medians")
    print(f"{'':22}{'stall s':>9}{'blocked s':>11}{'total s':>9}{'GB/s':>7}{'load s':>8}{'GB/s':>7}{'memory GiB':>12}")
    for name, row in medians.items():
        print(
            f"{name:22}{row['stall_s']:9.2f}{row['blocked_s']:11.2f}{row['total_s']:9.2f}{size / row['total_s'] / 1e9:7.2f}"
            f"{row['load_s']:8.2f}{size / row['load_s'] / 1e9:7.2f}{row['memory_bytes'] / 2**30:12.2f}"
        )


if __name__ == "__main__":
    main()
