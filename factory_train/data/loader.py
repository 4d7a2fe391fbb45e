"""Training rows for one rank: the same samples in the same global order at any world size.

Shape suffixes: B rows of a micro-batch, T = seq_len.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from factory_train.data.rows import IGNORE_INDEX, Row, Rows
from factory_train.data.samples import SampleSource

# A sum of this many 32-bit hashes is exact in a float64, which is what ranks reduce it in.
MAX_SAMPLES_PER_STEP = 2**20


class Position(Protocol):
    """A place in the order of samples: `Cursor` in an ordinary run, `leases.LeasedCursor` on an island."""

    def take(self, count: int) -> tuple[list[int], Position]:
        """Returns the numbers of the next `count` samples, and the position after them."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        ...


@dataclass(frozen=True)
class Cursor:
    """A position in the global order of samples; all a checkpoint needs to know about data.

    Args:
        samples: number of the next sample.
        skipped: ranges [start, stop) of samples that are jumped over.
    """

    samples: int = 0
    skipped: list[list[int]] = field(default_factory=list)

    def take(self, count: int) -> tuple[list[int], Cursor]:
        """Returns the numbers of the next `count` samples, and the cursor after them."""
        numbers: list[int] = []
        position = self.samples
        for start, stop in sorted(self.skipped):
            if stop <= position:
                continue
            room = count - len(numbers)
            if start - position >= room:
                break
            numbers.extend(range(position, start))
            position = stop
        last = position + count - len(numbers)
        numbers.extend(range(position, last))
        return numbers, Cursor(last, self.skipped)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Cursor:
        return Cursor(value["samples"], [list(pair) for pair in value["skipped"]])


@dataclass(frozen=True)
class MicroBatch:
    """What a rank processes at once, all int64.

    Args:
        tokens_BT: inputs.
        targets_BT: what each place is to predict; IGNORE_INDEX where it is nothing, as in padding.
        positions_BT: place of each token in its document; None where a whole row is one context.
    """

    tokens_BT: torch.Tensor
    targets_BT: torch.Tensor
    positions_BT: torch.Tensor | None = None

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """What the model takes."""
        return (self.tokens_BT,) if self.positions_BT is None else (self.tokens_BT, self.positions_BT)

    def to(self, device: torch.device) -> MicroBatch:
        """Returns it on a device; the copy is asynchronous where the memory is pinned."""
        tensors = (self.tokens_BT, self.targets_BT, self.positions_BT)
        return MicroBatch(*(None if tensor is None else tensor.to(device, non_blocking=True) for tensor in tensors))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of one optimizer step.

    Args:
        micro_batches: as many as on every other rank.
        num_targets: target tokens of the step over all ranks; what the loss is divided by.
        data_hash: sum over this rank's rows of a hash of sample number and row: its sum over ranks depends on the
            step's samples only.
        cursor_after: position to resume from once the step is done.
    """

    micro_batches: list[MicroBatch]
    num_targets: int
    data_hash: int
    cursor_after: Position


class TokenLoader:
    """Makes the step batches of one rank, ahead of their use, in a background thread.

    Args:
        samples: what is trained on.
        samples_per_step: rows of one optimizer step over all ranks.
        micro_batch_size: B.
        dp_rank, dp_size: this rank and the number of ranks that share a step's samples.
        cursor: where to begin.
        pin_memory: page-lock the tensors for asynchronous copies to the current CUDA device.
        prefetch: steps made ahead.
    """

    def __init__(
        self,
        samples: SampleSource,
        *,
        samples_per_step: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        cursor: Position | None = None,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        assert 1 <= samples_per_step <= MAX_SAMPLES_PER_STEP, samples_per_step
        assert 0 <= dp_rank < dp_size, (dp_rank, dp_size)
        assert prefetch >= 1, prefetch
        self._samples, self._samples_per_step = samples, samples_per_step
        self._micro_batch_size, self._dp_rank, self._dp_size = micro_batch_size, dp_rank, dp_size
        self._pin_memory = pin_memory
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=prefetch)
        self._closed = threading.Event()
        self._failure: BaseException | None = None
        # A new thread is on device 0, and pinning there would open a context on it for every rank of the machine.
        device = torch.cuda.current_device() if pin_memory else None
        self._thread = threading.Thread(target=self._produce, args=(cursor or Cursor(), device), name="token-loader", daemon=True)
        self._thread.start()

    def next_step(self) -> StepBatch:
        """Returns the batch of the next step, waiting for it if need be.

        Raises:
            Exception: whatever went wrong in the background thread.
        """
        assert not self._closed.is_set(), "the loader is closed"
        if self._failure is None:
            item = self._queue.get()
            if isinstance(item, StepBatch):
                return item
            self._failure = item
        raise self._failure

    def __iter__(self) -> Iterator[StepBatch]:
        """Yields steps without end: epochs follow each other."""
        while True:
            yield self.next_step()

    def close(self) -> None:
        """Ends the background thread; batches made ahead are dropped. May be called twice."""
        self._closed.set()
        while self._thread.is_alive():
            # It may be waiting for room in the queue.
            with contextlib.suppress(queue.Empty):
                self._queue.get_nowait()
            self._thread.join(timeout=0.01)

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _produce(self, cursor: Position, device: int | None) -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            while not self._closed.is_set():
                batch = self._make_step(cursor)
                cursor = batch.cursor_after
                self._queue.put(batch)
        except BaseException as error:
            self._queue.put(error)

    def _make_step(self, cursor: Position) -> StepBatch:
        numbers, cursor_after = cursor.take(self._samples_per_step)
        micro_batches, data_hash = [], 0
        for mine in _shares(len(numbers), self._micro_batch_size, self._dp_rank, self._dp_size):
            rows = []
            for sample in numbers[mine.start : mine.stop]:
                row = self._samples.row(sample)
                data_hash += _row_hash(sample, row)
                rows.append(row)
            micro_batches.append(_micro_batch(rows, self._micro_batch_size, self._samples, self._pin_memory))
        return StepBatch(micro_batches, self._samples.num_targets(numbers), data_hash, cursor_after)


def validation_batches(rows: Rows, *, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[MicroBatch]:
    """Returns one rank's part of the validation rows, in order; each token is a target at most once.

    Args:
        rows: of a run's own validation tokens.
        micro_batch_size: B.
        dp_rank, dp_size: this rank and how many share the rows; each gets the same number of micro-batches.
    """
    return [
        _micro_batch([rows.row(number) for number in mine], micro_batch_size, rows, pin_memory=False)
        for mine in _shares(len(rows), micro_batch_size, dp_rank, dp_size)
    ]


def _shares(total: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> Iterator[range]:
    """Yields the places, in 0..total-1, of each micro-batch of a rank; the last ones may be short or empty.

    Micro-batches are dealt to the ranks in turn, so that padding gathers at the end of the step.
    """
    per_round = dp_size * micro_batch_size
    for start in range(dp_rank * micro_batch_size, -(-total // per_round) * per_round, per_round):
        yield range(min(start, total), min(start + micro_batch_size, total))


def _row_hash(sample: int, row: Row) -> int:
    # As uint32 whatever the shards hold, so that the hash is a property of the tokens.
    if row.positions_T is None:
        content = np.append(row.tokens_T, row.targets_T[-1:]).astype("<u4")
    else:
        # Here targets are not the tokens one further; IGNORE_INDEX wraps to a number that no token is.
        content = np.concatenate((row.tokens_T, row.targets_T, row.positions_T)).astype("<u4")
    return zlib.crc32(content.tobytes(), zlib.crc32(sample.to_bytes(8, "little")))


def _micro_batch(rows: Sequence[Row], micro_batch_size: int, like: SampleSource | Rows, pin_memory: bool) -> MicroBatch:
    """Returns rows as one micro-batch, filled up with rows that have no target; `like` tells their shape."""
    shape = (micro_batch_size, like.seq_len)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, pin_memory=pin_memory)
    targets_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.int64, pin_memory=pin_memory)
    positions_BT = None
    if like.has_positions:
        positions_BT = torch.empty(shape, dtype=torch.int64, pin_memory=pin_memory)
        positions_BT[:] = torch.arange(like.seq_len)
    for index, row in enumerate(rows):
        tokens_BT[index] = torch.from_numpy(row.tokens_T)
        targets_BT[index] = torch.from_numpy(row.targets_T)
        if positions_BT is not None and row.positions_T is not None:
            positions_BT[index] = torch.from_numpy(row.positions_T)
    return MicroBatch(tokens_BT, targets_BT, positions_BT)
