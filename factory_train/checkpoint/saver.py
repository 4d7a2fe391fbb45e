"""Checkpoints for the trainer: saved beside training, or while it waits; a save that fails never ends training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from factory_train.checkpoint.agreement import Ranks
from factory_train.checkpoint.arena import Arena
from factory_train.checkpoint.entries import TensorEntry, plan_writes
from factory_train.checkpoint.failure import describe
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.part import writer_name
from factory_train.checkpoint.retention import Retention
from factory_train.checkpoint.save import give_back_space, save_checkpoint
from factory_train.checkpoint.snapshot import Snapshot
from factory_train.checkpoint.writer import Answer, Writer, WriterProcess, commit_order, write_order
from factory_train.config import CheckpointConfig
from factory_train.errors import FactoryTrainError, FencedError
from factory_train.run_dir import Attempt


@dataclass
class _Outstanding:
    """A save that is not over.

    Args:
        step: completed optimizer steps.
        began: on the monotonic clock.
        stall_before_s: what training had waited in all until then.
        answer: of this rank's writer to the order of the moment.
        committing: whether all parts are written and rank 0 was told to commit.
    """

    step: int
    began: float
    stall_before_s: float
    answer: Answer | None = None
    committing: bool = False


class Saver:
    """Saves the state of one gang; all ranks call the same methods at the same steps.

    Asynchronous saves have three stages. `begin` starts a copy of this rank's share to host memory, which the next
    optimizer step waits for (`before_update`). Then a process beside the rank writes it; `progress` tells whether that
    is done and rides on the step's reduction. When all ranks know that all parts are written (`agreed`), the process of
    rank 0 commits. Only one save is under way at a time: the next `begin` waits for it.

    Args:
        attempt: whose checkpoints they are.
        cfg: mode and retention.
        ranks: the gang.
        device: of the tensors.
        record: called on rank 0 with the name of an event and its facts.
        start_writer: makes the writer of an arena.
        files: filesystem operations of synchronous saves.
    """

    def __init__(
        self,
        attempt: Attempt,
        cfg: CheckpointConfig,
        ranks: Ranks,
        device: torch.device,
        record: Callable[..., None],
        *,
        start_writer: Callable[[Arena], Writer] = WriterProcess,
        files: DurableFiles | None = None,
    ) -> None:
        self._attempt, self._cfg, self._ranks, self._device, self._record = attempt, cfg, ranks, device, record
        self._start_writer, self._files = start_writer, files or DurableFiles()
        self._retention = Retention.of(cfg)
        self._arena: Arena | None = None
        self._snapshot: Snapshot | None = None
        self._writer: Writer | None = None
        self._save: _Outstanding | None = None
        self._failure: FactoryTrainError | None = None
        self._stall_s = self._reported_stall_s = 0.0

    # What the trainer calls

    def prepare(self, entries: Sequence[TensorEntry]) -> None:
        """Takes the host memory and starts the writer ahead of the first save; without it that save waits for both."""
        if self._cfg.mode == "async":
            # What cannot be had now may be there at the first save, which says so if it is not.
            with contextlib.suppress(OSError):
                self._make_ready(plan_writes(entries, 0, self._ranks.rank, {}).part.num_bytes)

    def begin(self, step: int, entries: Sequence[TensorEntry], state: Mapping[str, Any]) -> None:
        """Starts a save. The tensors must not change before `before_update` has returned.

        Args:
            step: completed optimizer steps.
            entries: what this rank holds.
            state: run state as JSON values; that of rank 0 is written.

        Raises:
            FencedError: a newer attempt exists.
        """
        began = time.monotonic()
        with self._stalling():
            self._end_outstanding()
            self._failure = None
            self._save = _Outstanding(step, began, self._stall_s)
            if self._cfg.mode == "async":
                self._begin_beside(step, entries, state)
            else:
                self._save_now(step, entries, state)

    def before_update(self) -> None:
        """Waits until the optimizer may change the tensors."""
        if self._snapshot is not None and self._save is not None:
            with self._stalling():
                self._snapshot.before_update()

    def progress(self) -> tuple[bool, bool]:
        """Returns whether this rank's part of the save under way is written, and whether it failed; never waits.

        Raises:
            FencedError: a newer attempt exists (rank 0).
        """
        save = self._save
        if save is None:
            return False, False
        if save.answer is None and self._writer is not None:
            save.answer = self._writer.answer(0.0)
        if save.committing:
            if self._ranks.rank == 0 and save.answer is not None:
                self._conclude()
            return False, False
        return save.answer is not None and save.answer.failure is None, save.answer is not None and save.answer.failure is not None

    def agreed(self, step: int, written: int, failed: int) -> None:
        """Acts on what the reduction of step `step` said: on how many ranks `progress` was written, and failed."""
        save = self._save
        if save is None or save.committing or step <= save.step or written + failed < self._ranks.world_size:
            return
        if failed:
            self._end_writing(save)
        else:
            self._order_commit(save)

    def finish(self) -> None:
        """Waits until the save under way is over.

        Raises:
            CheckpointError: the last save failed; the same on all ranks.
            FencedError: a newer attempt exists.
        """
        with self._stalling():
            if self._save is not None and not self._save.committing:
                self._end_writing(self._save)
            # From here on only rank 0 knows whether something is still under way.
            self._ranks.agree_on_main("committing a checkpoint", self._outcome)
            self._save = None

    def take_stall_s(self) -> float:
        """Returns how long training has waited for checkpoints since the last call, in seconds."""
        stalled, self._reported_stall_s = self._stall_s - self._reported_stall_s, self._stall_s
        return stalled

    def close(self) -> None:
        """Ends the writer and gives the memory back; what was under way stays unfinished."""
        self._save = None
        self._release()

    # Beside training

    def _make_ready(self, num_bytes: int) -> None:
        if self._arena is None or self._arena.size < num_bytes:
            self._release()
            self._arena = Arena.make(num_bytes)
            self._snapshot = Snapshot(self._arena, self._device)
        if self._writer is None:
            self._writer = self._start_writer(self._arena)

    def _release(self) -> None:
        if self._snapshot is not None:
            self._snapshot.wait()
        if self._writer is not None:
            self._writer.close()
        if self._snapshot is not None:
            self._snapshot.close()
        if self._arena is not None:
            self._arena.close()
        self._writer = self._snapshot = self._arena = None

    def _begin_beside(self, step: int, entries: Sequence[TensorEntry], state: Mapping[str, Any]) -> None:
        save = self._save
        assert save is not None
        try:
            writes = plan_writes(entries, step, self._ranks.rank, state)
            order = write_order(self._attempt, writes.part, rank=self._ranks.rank)
            self._make_ready(writes.part.num_bytes)
        except Exception as error:
            # The other ranks have begun: this one takes part as one that failed.
            save.answer = Answer({}, describe(error, "beginning a checkpoint", self._ranks.rank), 0.0)
            return
        snapshot, writer = self._snapshot, self._writer
        assert snapshot is not None
        assert writer is not None

        def hand_over(failure: Exception | None) -> None:
            try:
                if failure is not None:
                    raise failure
                writer.order(order)
            except Exception as error:
                save.answer = Answer({}, describe(error, "copying the state", self._ranks.rank), 0.0)

        snapshot.begin(writes, hand_over)

    def _order_commit(self, save: _Outstanding) -> None:
        save.committing, save.answer = True, None
        if self._ranks.rank == 0:
            assert self._writer is not None
            writers = [writer_name(rank) for rank in range(self._ranks.world_size)]
            self._writer.order(commit_order(self._attempt, save.step, writers, self._retention))

    def _end_outstanding(self) -> None:
        """Waits for the save under way, rank 0 for its commit too."""
        if self._save is not None and not self._save.committing:
            self._end_writing(self._save)
        if self._save is not None and self._ranks.rank == 0:
            self._conclude()
        self._save = None

    def _end_writing(self, save: _Outstanding) -> None:
        """Waits until all ranks have written or failed, and orders the commit or gives up; all ranks call it."""
        try:
            self._ranks.agree("writing a checkpoint", lambda: self._await(save))
        except FencedError:
            raise
        except FactoryTrainError as error:
            self._failed(save, error)
            self._save = None
        else:
            self._order_commit(save)

    def _outcome(self) -> None:
        """Raises what went wrong with the last save; rank 0 alone."""
        if self._save is not None:
            self._conclude()
        if self._failure is not None:
            raise self._failure

    def _await(self, save: _Outstanding) -> dict[str, Any]:
        """Returns what the writer's answer holds, or raises its failure."""
        if self._snapshot is not None:
            self._snapshot.wait()
        if save.answer is None:
            assert self._writer is not None
            save.answer = self._writer.answer(None)
        assert save.answer is not None
        if error := save.answer.error():
            raise error
        return save.answer.value

    def _conclude(self) -> None:
        """Records how the commit went; rank 0 alone."""
        save = self._save
        assert save is not None
        try:
            done = self._await(save)
        except FencedError:
            raise
        except FactoryTrainError as error:
            self._failed(save, error)
        else:
            self._succeeded(save, done)
        self._save = None

    # Both

    def _save_now(self, step: int, entries: Sequence[TensorEntry], state: Mapping[str, Any]) -> None:
        save = self._save
        assert save is not None
        try:
            done = save_checkpoint(
                self._attempt,
                step,
                entries,
                state,
                rank=self._ranks.rank,
                world_size=self._ranks.world_size,
                retention=self._retention,
                files=self._files,
            )
        except FencedError:
            raise
        except FactoryTrainError as error:
            self._failed(save, error)
        else:
            self._succeeded(save, done.to_json())
        self._save = None

    def _succeeded(self, save: _Outstanding, done: Mapping[str, Any]) -> None:
        if self._ranks.rank == 0:
            self._record(
                "checkpoint",
                step=save.step,
                path=done["name"],
                mode=self._cfg.mode,
                num_bytes=done["num_bytes"],
                removed=done["removed"],
                warning=done["warning"],
                seconds=time.monotonic() - save.began,
                stall_s=self._stall_s - save.stall_before_s,
            )

    def _failed(self, save: _Outstanding, error: FactoryTrainError) -> None:
        self._failure = error
        if self._writer is not None:
            # Whatever state it is in, the next save begins with a new one.
            self._writer.close()
            self._writer = None
        if self._ranks.rank == 0:
            self._record("checkpoint-failed", step=save.step, message=str(error).splitlines()[0], fix=error.fix)
            give_back_space(self._attempt, save.step, self._files)

    @contextlib.contextmanager
    def _stalling(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stall_s += time.monotonic() - began
