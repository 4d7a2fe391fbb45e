"""The loader: the same samples in the same order at any world size, from any cursor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from factory_train.config import DataConfig
from factory_train.data import loader as loader_module
from factory_train.data.loader import Cursor, StepBatch, TokenLoader, validation_batches
from factory_train.data.order import SampleOrder
from factory_train.data.prepare import copy_for_run, prepare
from factory_train.data.rows import IGNORE_INDEX, ConcatenatedRows
from factory_train.data.samples import ShuffledRows
from factory_train.data.shards import TokenStream

SEQ_LEN = 8
SAMPLES_PER_STEP = 12
SEED = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    # Numbers, so that no two rows are the same.
    (root / "text.txt").write_text(" ".join(map(str, range(300))))
    config = DataConfig(path=str(root / "text.txt"), tokenizer="byte", validation_fraction=0.2)
    return prepare(config, root / "cache", lambda line: None, shard_tokens=50)


@pytest.fixture
def stream(folder: Path) -> TokenStream:
    return TokenStream(folder, "train")


def num_rows(stream: TokenStream, seq_len: int) -> int:
    return len(ConcatenatedRows(stream, seq_len))


def open_loader(stream: TokenStream, *, seed: int = SEED, **changes: Any) -> TokenLoader:
    settings = {
        "samples_per_step": SAMPLES_PER_STEP,
        "micro_batch_size": 2,
        "dp_rank": 0,
        "dp_size": 1,
    }
    return TokenLoader(ShuffledRows(ConcatenatedRows(stream, SEQ_LEN), seed), **{**settings, **changes})


def steps(stream: TokenStream, count: int, **changes: Any) -> list[StepBatch]:
    with open_loader(stream, **changes) as loader:
        return [loader.next_step() for _ in range(count)]


def real_rows(batches: list[StepBatch]) -> list[list[tuple[int, ...]]]:
    """Returns for each rank's batch of one step its rows that are not padding, tokens and last target."""
    return [
        [
            (*tokens.tolist(), int(targets[-1]))
            for micro in batch.micro_batches
            for tokens, targets in zip(micro.tokens_BT, micro.targets_BT, strict=True)
            if targets[0] != IGNORE_INDEX
        ]
        for batch in batches
    ]


def test_targets_are_the_tokens_one_further(stream: TokenStream) -> None:
    order = SampleOrder(num_rows(stream, SEQ_LEN), SEED)
    (batch,) = steps(stream, 1)
    for sample, row in enumerate(real_rows([batch])[0]):
        assert list(row) == stream.slice(order.row_of_sample(sample) * SEQ_LEN, SEQ_LEN + 1).tolist()
    micro = batch.micro_batches[0]
    assert micro.tokens_BT.dtype == micro.targets_BT.dtype == torch.int64
    assert micro.tokens_BT.shape == micro.targets_BT.shape == (2, SEQ_LEN)
    assert torch.equal(micro.tokens_BT[:, 1:], micro.targets_BT[:, :-1])


def test_hashes_are_those_that_old_runs_logged(stream: TokenStream) -> None:
    assert [step.data_hash for step in steps(stream, 3)] == [24815391319, 28852634702, 30111220630]


def test_number_of_rows_leaves_room_for_the_last_target(stream: TokenStream) -> None:
    rows = num_rows(stream, SEQ_LEN)
    assert rows * SEQ_LEN + 1 <= stream.num_tokens < (rows + 1) * SEQ_LEN + 1


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 7])
def test_any_world_size_and_accumulation_sees_the_same_samples(stream: TokenStream, dp_size: int, micro_batch_size: int) -> None:
    # Enough steps to pass the end of an epoch.
    count = num_rows(stream, SEQ_LEN) // SAMPLES_PER_STEP + 2
    reference = steps(stream, count)
    ranks = [steps(stream, count, dp_rank=rank, dp_size=dp_size, micro_batch_size=micro_batch_size) for rank in range(dp_size)]
    for step, alone in enumerate(reference):
        parts = [rank[step] for rank in ranks]
        assert sum(part.data_hash for part in parts) == alone.data_hash
        assert sorted(row for rows in real_rows(parts) for row in rows) == sorted(real_rows([alone])[0])
        assert {part.num_targets for part in parts} == {SAMPLES_PER_STEP * SEQ_LEN}
        assert [part.cursor_after for part in parts] == [alone.cursor_after] * dp_size
        assert {len(part.micro_batches) for part in parts} == {-(-SAMPLES_PER_STEP // (dp_size * micro_batch_size))}


def test_padding_has_no_targets_and_the_shape_of_any_batch(stream: TokenStream) -> None:
    ranks = [steps(stream, 1, dp_rank=rank, dp_size=4, micro_batch_size=4)[0] for rank in range(4)]
    assert [len(rows) for rows in real_rows(ranks)] == [4, 4, 4, 0]
    (padding,) = ranks[3].micro_batches
    assert padding.tokens_BT.shape == (4, SEQ_LEN)
    assert (padding.targets_BT == IGNORE_INDEX).all()
    assert ranks[3].data_hash == 0
    targets = sum(int((micro.targets_BT != IGNORE_INDEX).sum()) for rank in ranks for micro in rank.micro_batches)
    assert targets == ranks[0].num_targets


def test_each_epoch_sees_every_row_once_in_another_order(stream: TokenStream) -> None:
    rows = num_rows(stream, SEQ_LEN)
    first, second = real_rows(steps(stream, 2, samples_per_step=rows))
    assert len(set(first)) == rows
    assert sorted(first) == sorted(second)
    assert first != second


def test_resume_from_any_cursor_sees_what_an_undisturbed_run_sees(stream: TokenStream) -> None:
    straight = steps(stream, 12)
    for done in (1, 5, 11):
        saved = json.loads(json.dumps(straight[done - 1].cursor_after.to_json()))
        resumed = steps(stream, 12 - done, cursor=Cursor.from_json(saved), dp_rank=0, dp_size=1, micro_batch_size=3)
        assert [step.data_hash for step in resumed] == [step.data_hash for step in straight[done:]]


def test_seed_and_position_change_the_hash(stream: TokenStream) -> None:
    hashes = [steps(stream, 1, seed=seed)[0].data_hash for seed in range(3)]
    rows = num_rows(stream, SEQ_LEN)
    # The same rows in another order are other samples: all of them in one step, in two different epochs.
    hashes += [step.data_hash for step in steps(stream, 2, samples_per_step=rows)]
    assert len(set(hashes)) == 5


def test_hash_sums_exactly_as_float64(stream: TokenStream) -> None:
    ranks = [steps(stream, 1, dp_rank=rank, dp_size=3)[0].data_hash for rank in range(3)]
    assert int(torch.tensor(ranks, dtype=torch.float64).sum()) == sum(ranks)
    assert loader_module.MAX_SAMPLES_PER_STEP * (2**32 - 1) < 2**53


def test_skipped_ranges_are_jumped_over() -> None:
    cursor = Cursor(samples=0, skipped=[[10, 13], [2, 4], [20, 30]])
    first, cursor = cursor.take(5)
    second, cursor = cursor.take(6)
    third, cursor = cursor.take(8)
    assert first == [0, 1, 4, 5, 6]
    assert second == [7, 8, 9, 13, 14, 15]
    assert third == [16, 17, 18, 19, 30, 31, 32, 33]
    assert cursor.samples == 34


def test_cursor_inside_or_before_touching_ranges_jumps_once() -> None:
    assert Cursor(5, [[3, 8], [8, 9]]).take(2) == ([9, 10], Cursor(11, [[3, 8], [8, 9]]))
    assert Cursor(0, [[0, 3], [1, 5]]).take(1)[0] == [5]
    # A range that begins where a step ends is left for the next step.
    assert Cursor(0, [[2, 4]]).take(2) == ([0, 1], Cursor(2, [[2, 4]]))


def test_skipped_samples_do_not_reach_the_ranks(stream: TokenStream) -> None:
    plain, jumping = steps(stream, 3), steps(stream, 2, cursor=Cursor(0, [[SAMPLES_PER_STEP, 2 * SAMPLES_PER_STEP]]))
    assert [step.data_hash for step in jumping] == [plain[0].data_hash, plain[2].data_hash]
    assert jumping[1].cursor_after.samples == plain[2].cursor_after.samples


class FailingStream:
    """Gives good rows for a while, as a disk does."""

    def __init__(self, stream: TokenStream, good: int) -> None:
        self.num_tokens, self._stream, self._good = stream.num_tokens, stream, good

    def slice(self, start: int, length: int) -> npt.NDArray[np.int64]:
        self._good -= 1
        if self._good < 0:
            raise OSError("the disk has gone")
        return self._stream.slice(start, length)


def test_failure_in_the_background_reaches_the_caller_after_the_good_steps(stream: TokenStream) -> None:
    with open_loader(FailingStream(stream, 2 * SAMPLES_PER_STEP)) as loader:  # type: ignore[arg-type]
        assert [loader.next_step().data_hash for _ in range(2)] == [step.data_hash for step in steps(stream, 2)]
        for _ in range(2):
            with pytest.raises(OSError, match="the disk has gone"):
                loader.next_step()


@pytest.mark.parametrize("good", [0, 10**9])
def test_close_ends_the_thread_whatever_it_is_doing(stream: TokenStream, good: int) -> None:
    loader = open_loader(FailingStream(stream, good), prefetch=1)  # type: ignore[arg-type]
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()


def test_iteration_yields_the_steps(stream: TokenStream) -> None:
    with open_loader(stream) as loader:
        hashes = [step.data_hash for step, _ in zip(loader, range(3), strict=False)]
    assert hashes == [step.data_hash for step in steps(stream, 3)]


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_validation_rows_are_disjoint_windows_in_order_whoever_computes_them(folder: Path, tmp_path: Path, dp_size: int) -> None:
    copy_for_run(folder, tmp_path, 7 * SEQ_LEN + 1)
    stream = TokenStream(tmp_path, "validation")
    rows = ConcatenatedRows(stream, SEQ_LEN)
    ranks = [validation_batches(rows, micro_batch_size=2, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    # Micro-batches are dealt in turn.
    dealt = [batches[turn] for turn in range(len(ranks[0])) for batches in ranks]
    targets = torch.cat([micro.targets_BT for micro in dealt]).flatten()
    assert targets[targets != IGNORE_INDEX].tolist() == stream.slice(1, 7 * SEQ_LEN).tolist()


@pytest.mark.gpu
def test_pinned_batches_copy_to_the_device(stream: TokenStream) -> None:
    (batch,) = steps(stream, 1, pin_memory=True)
    micro = batch.micro_batches[0]
    assert micro.tokens_BT.is_pinned()
    assert micro.targets_BT.is_pinned()
    assert torch.equal(micro.tokens_BT.to("cuda", non_blocking=True).cpu(), micro.tokens_BT)
