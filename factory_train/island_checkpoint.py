"""Checkpoints of islands: the outer state once, in the run's own folder, and each island's inner state in the island's.

The run's checkpoints look like any other's, their weights being the outer parameters: evaluation, export and `init_from` need
know nothing of islands. An island's checkpoint holds its inner parameters, optimizer, error feedback and the round under way; it
names the fingerprint of the outer state it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.catalog import CheckpointInfo, list_checkpoints, select
from factory_train.checkpoint.entries import TensorEntry
from factory_train.checkpoint.load import LoadedState, load_checkpoint
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.checkpoint.saver import Saver
from factory_train.checkpoint.verify import verify_files
from factory_train.distributed.box import Box, local_box
from factory_train.distributed.outer_state import Encoded, OuterState
from factory_train.errors import FactoryTrainError, IntegrityError
from factory_train.run_dir import RunDir

# So many of the run's newest checkpoints may be the one that all islands go on from, if they have none of the newest.
_LOOK_BACK = 2


@dataclass(frozen=True)
class Placed:
    """What a rank holds of the model.

    Args:
        parameters: of the model, by name.
        copy, copies: which copy of its shards this rank holds, out of how many.
    """

    parameters: Mapping[str, torch.Tensor]
    copy: int
    copies: int

    def entries(self, section: str, tensors: Mapping[str, torch.Tensor], *, once: bool = False) -> list[TensorEntry]:
        """Describes tensors shaped like the local shards of parameters.

        Args:
            once: whether only the first copy holds them; for the others they are empty.
        """
        found = []
        for name, tensor in tensors.items():
            box, shape = local_box(self.parameters[name])
            if not once:
                found.append(TensorEntry(name, section, tensor, box, shape, self.copy, self.copies))
            elif self.copy == 0:
                found.append(TensorEntry(name, section, tensor, box, shape))
            else:
                nothing = Box((0,) * len(shape), (0,) * len(shape)) if shape else box
                found.append(TensorEntry(name, section, tensor.new_empty(nothing.shape), nothing, shape))
        return found


def outer_entries(placed: Placed, state: OuterState) -> list[TensorEntry]:
    """Returns what the run's checkpoint holds: outer parameters as its weights, and their momentum."""
    return placed.entries("weights", state.named("outer")) + placed.entries("outer/momentum", state.named("momentum"))


def error_entries(placed: Placed, state: OuterState) -> list[TensorEntry]:
    """Returns what an island's checkpoint holds of the error feedback; nothing where there is none."""
    return placed.entries("diloco/error", state.named("error"), once=True)


def in_flight_entries(placed: Placed, state: OuterState, fragment: int, encoded: Encoded | None, ranks: Ranks) -> list[TensorEntry]:
    """Returns what an island's checkpoint holds of the round under way: each rank's codes, and what they leave out.

    Args:
        encoded: of this rank; None on copies that are not the first.
    """
    codes, scales = (encoded.codes, encoded.scales) if encoded else (torch.empty(0, dtype=torch.uint8), torch.empty(0))
    sizes = ranks.agree("describing the round under way", lambda: [codes.numel(), scales.numel()])
    found = []
    for rank, size in enumerate(sizes):
        for section, tensor, numel in (("diloco/codes", codes, size[0]), ("diloco/scales", scales, size[1])):
            mine = tensor if rank == ranks.rank else tensor.new_empty(0)
            found.append(TensorEntry(f"rank-{rank:05d}", section, mine, Box((0,), (mine.numel(),)), (numel,)))
    left_out = state.left_out_views(fragment, encoded.left_out if encoded else None)
    return found + placed.entries("diloco/left_out", left_out, once=True)


class IslandSaver:
    """Both checkpoints of a step as one save, for the trainer.

    Args:
        inner: of the island.
        outer: of the run.
        outer_entries: what the run's checkpoint holds, on the island that writes it; None on the others.
        describe: returns what both say of the exchange; all ranks of the island call it.
    """

    def __init__(
        self, inner: Saver, outer: Saver, outer_entries: Callable[[], Sequence[TensorEntry] | None], describe: Callable[[], dict[str, Any]]
    ) -> None:
        self._inner, self._outer, self._outer_entries, self._describe = inner, outer, outer_entries, describe
        self._both = False

    def prepare(self, entries: Sequence[TensorEntry]) -> None:
        """See `Saver`."""
        self._inner.prepare(entries)
        if (outer := self._outer_entries()) is not None:
            self._outer.prepare(outer)

    def begin(self, step: int, entries: Sequence[TensorEntry], state: Mapping[str, Any]) -> None:
        """See `Saver`."""
        told = {**state, "diloco": self._describe()}
        outer = self._outer_entries()
        if self._both and outer is None:
            # Another island writes for the run now; what was begun here is ended here.
            self._outer.finish()
        self._inner.begin(step, entries, told)
        self._both = outer is not None
        if outer is not None:
            self._outer.begin(step, outer, told)

    def before_update(self) -> None:
        """See `Saver`."""
        self._inner.before_update()
        self._outer.before_update()

    def progress(self) -> tuple[bool, bool]:
        """See `Saver`: the part of a rank is written when both are."""
        written, failed = self._inner.progress()
        if not self._both:
            return written, failed
        outer_written, outer_failed = self._outer.progress()
        return written and outer_written, failed or outer_failed

    def agreed(self, step: int, written: int, failed: int) -> None:
        """See `Saver`."""
        self._inner.agreed(step, written, failed)
        if self._both:
            self._outer.agreed(step, written, failed)

    def finish(self) -> None:
        """See `Saver`."""
        try:
            self._inner.finish()
        finally:
            if self._both:
                self._outer.finish()

    def take_stall_s(self) -> float:
        """See `Saver`."""
        return self._inner.take_stall_s() + self._outer.take_stall_s()

    def close(self) -> None:
        """See `Saver`."""
        self._inner.close()
        self._outer.close()


def saved_steps(run: RunDir) -> tuple[int, ...]:
    """Returns the steps of the complete checkpoints of a run or an island, the newest first."""
    return tuple(dict.fromkeys(info.step for info in list_checkpoints(run)))


def step_to_start_from(run: RunDir, islands: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the step of the checkpoint that islands begin from; 0 for the beginning.

    The newest that all of them have, if it is among the newest of the run; else the run's newest: an island that has none of
    that step begins from the outer parameters. Damaged ones of the run are passed over.

    Args:
        islands: the steps that each has checkpoints of.

    Raises:
        IntegrityError: there are checkpoints, and every one is damaged.
    """
    found = list_checkpoints(run)
    # Looked at from the newest on, and no further than needed: every byte of a checkpoint is read.
    steps: list[int] = []
    for info in found:
        if len(steps) < _LOOK_BACK and info.step not in steps and _is_intact(info):
            steps.append(info.step)
            if all(info.step in have for have in islands.values()):
                break
    if found and not steps:
        raise IntegrityError("every checkpoint is damaged", where=run.name, fix="start a new run (drop run=...)")
    shared = [step for step in steps[:_LOOK_BACK] if all(step in have for have in islands.values())]
    return shared[0] if shared else steps[0] if steps else 0


def saved_deal(run: RunDir, step: int) -> dict[str, Any] | None:
    """Returns which samples were whose when the run's checkpoint of a step was saved; None where it was no run of islands."""
    with CheckpointReader(select(run, str(step)).path) as reader:
        told = reader.state.get("diloco")
    return told["deal"] if told else None


def deals_to_start_with(run: RunDir) -> dict[str, dict[str, Any] | None]:
    """Returns the deals of the newest intact checkpoints of a run, by step as JSON has it."""
    steps: list[int] = []
    for info in list_checkpoints(run):
        if len(steps) < _LOOK_BACK and info.step not in steps and _is_intact(info):
            steps.append(info.step)
    return {str(step): saved_deal(run, step) for step in steps}


def newest_of_all(
    outer: Mapping[str, Mapping[str, Mapping[str, Any] | None]],
) -> tuple[int, Mapping[str, Any] | None, tuple[str, ...]]:
    """Returns the newest step that islands with run directories of their own can begin from, its deal, and which of them can.

    Args:
        outer: of each, the deals of its run's checkpoints (`deals_to_start_with`); nobody's progress is given up for another's sake.
    """
    step = max(int(step) for deals in outer.values() for step in deals)
    able = tuple(sorted(name for name, deals in outer.items() if str(step) in deals))
    return step, outer[able[0]][str(step)], able


def _is_intact(info: CheckpointInfo) -> bool:
    try:
        verify_files(info.path, info.manifest())
    except FactoryTrainError:
        return False
    return True


def load_at(
    run: RunDir, step: int, entries: Callable[[dict[str, Any]], list[TensorEntry]], ranks: Ranks, fits: Callable[[dict[str, Any]], bool]
) -> LoadedState | None:
    """Loads the newest checkpoint of a step that fits; None when there is none.

    Args:
        entries: what to fill, given the state of the checkpoint.
        fits: whether a checkpoint is the right one, by its state.

    Raises:
        IntegrityError: it is damaged.
        ConfigError: it does not fit the model.
    """

    def find() -> tuple[str, dict[str, Any]] | None:
        candidates: list[CheckpointInfo] = [info for info in list_checkpoints(run) if info.step == step]
        for info in candidates:
            try:
                with CheckpointReader(info.path) as reader:
                    state = reader.state
            except IntegrityError:
                continue
            if fits(state):
                return str(info.path), state
        return None

    found = ranks.agree_on_main("looking for a checkpoint", find)
    if found is None:
        return None
    path, state = found
    with CheckpointReader(Path(path)) as reader:
        return load_checkpoint(reader, entries(state), ranks=ranks)
