"""Packing: every pair of a document once, no row too long, the same rows whoever asks, and rows filled well."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stories_plugin  # noqa: F401 (a data source)
from hypothesis import given
from hypothesis import strategies as st

from factory_train import storage
from factory_train.config import Config, DataConfig
from factory_train.data import packing_index
from factory_train.data.baselines import KneserNeyBigram, baselines
from factory_train.data.loader import Cursor, StepBatch, TokenLoader, validation_batches
from factory_train.data.manifest import DataManifest
from factory_train.data.packing import Packing, PackingFigures, best_fit_decreasing, pack, pack_at_once
from factory_train.data.packing_index import load_packing, packing_folder, prepare_packing
from factory_train.data.prepare import copy_for_run, prepare
from factory_train.data.rows import IGNORE_INDEX, PackedRows, training_rows, validation_rows
from factory_train.data.samples import ShuffledRows
from factory_train.data.shards import TokenStream
from factory_train.errors import DataError, PreflightError

SEQ_LEN = 16
SAMPLES_PER_STEP = 12
SEED = 3

document_lengths = st.lists(st.integers(1, 60), max_size=50)


def packed(lengths: list[int], seq_len: int, window_documents: int = 7) -> tuple[list[Packing], PackingFigures]:
    starts = np.cumsum([0, *lengths])
    windows = list(pack(starts[:-1], int(starts[-1]), seq_len, window_documents=window_documents))
    return [packing for packing, _ in windows], windows[-1][1] if windows else PackingFigures(seq_len)


@given(document_lengths, st.integers(1, 24))
def test_every_pair_of_every_document_is_in_exactly_one_piece(lengths: list[int], seq_len: int) -> None:
    windows, _ = packed(lengths, seq_len)
    found = sorted(
        start + offset
        for window in windows
        for start, length in zip(window.starts_P.tolist(), window.lengths_P.tolist(), strict=True)
        for offset in range(length)
    )
    # A pair goes by its input: every token but the last of each document.
    lasts = set((np.cumsum(lengths) - 1).tolist())
    assert found == [token for token in range(sum(lengths)) if token not in lasts]


@given(document_lengths, st.integers(1, 24))
def test_no_row_is_too_long_or_empty_and_figures_are_those_of_the_rows(lengths: list[int], seq_len: int) -> None:
    windows, figures = packed(lengths, seq_len)
    loads = []
    for window in windows:
        borders = window.borders_S.tolist()
        assert borders[0] == 0
        assert borders[-1] == len(window.lengths_P)
        of_rows = [int(window.lengths_P[first:last].sum()) for first, last in itertools.pairwise(borders)]
        assert of_rows == window.targets_R.tolist()
        loads += of_rows
    assert all(0 < load <= seq_len for load in loads)
    pairs = [length - 1 for length in lengths]
    assert figures.rows == len(loads)
    assert figures.targets == sum(loads) == sum(pairs)
    assert figures.documents == sum(count > 0 for count in pairs)
    assert figures.cut == sum(count > seq_len for count in pairs)
    assert figures.pieces == sum(-(-count // seq_len) for count in pairs)


@given(document_lengths, st.integers(1, 24))
def test_only_documents_longer_than_a_row_are_cut_and_as_seldom_as_can_be(lengths: list[int], seq_len: int) -> None:
    starts = np.cumsum([0, *lengths])
    packing = pack_at_once(starts[:-1], int(starts[-1]), seq_len)
    document_P = np.searchsorted(starts, packing.starts_P, side="right") - 1
    counts = np.bincount(document_P, minlength=len(lengths)) if len(document_P) else np.zeros(len(lengths), dtype=int)
    assert counts.tolist() == [-(-(length - 1) // seq_len) for length in lengths]


@given(st.integers(1, 40).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=80))))
def test_rows_are_those_of_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    rows = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        best = min((row for row, room in enumerate(rooms) if room >= length), key=rooms.__getitem__, default=None)
        if best is None:
            rooms.append(capacity - length)
        else:
            rooms[best] -= length
    loads = np.bincount(rows, weights=lengths, minlength=len(rooms)) if lengths else np.empty(0)
    assert sorted(capacity - loads) == sorted(rooms)


def test_many_documents_fill_rows_almost_wholly_and_soon() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(np.log(500), 1.1, 200_000).astype(np.int64))
    _, figures = packed(lengths.tolist(), 2048, window_documents=50_000)
    assert figures.documents == 200_000
    assert figures.efficiency > 0.999


def test_documents_that_cannot_share_a_row_leave_it_half_empty_and_the_figures_say_so() -> None:
    _, figures = packed([61] * 10, 100)
    assert figures.efficiency == pytest.approx(0.6)
    assert str(figures) == "10 documents in 10 rows of 100, 0 longer than a row, 60.00% of the places hold a target"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("packing") / "cache"


@pytest.fixture(scope="module")
def dataset(cache: Path) -> Path:
    config = DataConfig(name="stories", tokenizer="byte", validation_fraction=0.2)
    return prepare(config, cache, lambda line: None, shard_tokens=1000)


@pytest.fixture(scope="module")
def cfg() -> Config:
    config = Config(recipe="packed")
    config.data.packing, config.train.seq_len = "document", SEQ_LEN
    return config


@pytest.fixture
def folder(cache: Path, dataset: Path) -> Path:
    """The packing of the data set."""
    prepare_packing(cache, dataset, SEQ_LEN, lambda line: None)
    return packing_folder(cache, dataset.name, SEQ_LEN)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_hold_whole_documents_with_their_own_positions(folder: Path, cache: Path, dataset: Path, cfg: Config) -> None:
    rows, stream = training_rows(cfg, cache, dataset), TokenStream(dataset, "train")
    assert isinstance(rows, PackedRows)
    ends = [*stream.document_starts()[1:].tolist(), stream.num_tokens]
    expected = sorted(
        tuple(stream.slice(at, min(SEQ_LEN + 1, end - at)).tolist())
        for start, end in zip(stream.document_starts().tolist(), ends, strict=True)
        for at in range(start, end - 1, SEQ_LEN)
    )
    found = []
    for number in range(len(rows)):
        row = rows.row(number)
        assert row.positions_T is not None
        assert row.tokens_T.shape == row.targets_T.shape == row.positions_T.shape == (SEQ_LEN,)
        assert row.tokens_T.dtype == row.targets_T.dtype == row.positions_T.dtype == np.int64
        begins = [*np.flatnonzero(row.positions_T == 0).tolist(), SEQ_LEN]
        for first, last in itertools.pairwise(begins):
            assert row.positions_T[first:last].tolist() == list(range(last - first))
            if row.targets_T[first] == IGNORE_INDEX:
                # What is left over: at the end, and for nobody.
                assert last == SEQ_LEN
                assert set(row.targets_T[first:].tolist()) == {IGNORE_INDEX}
            else:
                assert row.tokens_T[first + 1 : last].tolist() == row.targets_T[first : last - 1].tolist()
                found.append((*row.tokens_T[first:last].tolist(), int(row.targets_T[last - 1])))
        assert rows.num_targets(np.array([number])) == np.count_nonzero(row.targets_T != IGNORE_INDEX) > 0
    assert sorted(found) == expected
    assert rows.num_targets(np.arange(len(rows))) == sum(len(piece) - 1 for piece in expected)


def test_index_is_the_same_whoever_makes_it_and_says_how_well_rows_are_filled(
    folder: Path, cache: Path, dataset: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    note = prepare_packing(tmp_path, dataset, SEQ_LEN, lines.append)
    assert contents(packing_folder(tmp_path, dataset.name, SEQ_LEN)) == contents(folder)
    assert note == prepare_packing(cache, dataset, SEQ_LEN, lines.append)
    index = json.loads((folder / "packing.json").read_text())
    figures = PackingFigures(**index["figures"])
    assert lines == [f"packing: {DataManifest.load(dataset).description}: {figures}"] * 2
    assert note.startswith(str(figures))
    assert index["efficiency"] == pytest.approx(figures.efficiency, abs=1e-6)
    manifest = DataManifest.load(dataset)
    assert index["dataset_id"] == manifest.id
    assert figures.targets == manifest.splits["train"].num_tokens - manifest.splits["train"].num_documents


@pytest.mark.parametrize("window", [1, 7, 10**6])
def test_windows_of_any_size_hold_the_same_pairs(
    cache: Path, dataset: Path, cfg: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, window: int
) -> None:
    monkeypatch.setattr("factory_train.data.packing_index.pack", lambda *of: pack(*of, window_documents=window))
    prepare_packing(tmp_path, dataset, SEQ_LEN, lambda line: None)

    def pairs(at: Path) -> list[tuple[int, int, int]]:
        rows, found = training_rows(cfg, at, dataset), []
        for number in range(len(rows)):
            row = rows.row(number)
            assert row.positions_T is not None
            found += list(zip(row.tokens_T.tolist(), row.targets_T.tolist(), row.positions_T.tolist(), strict=True))
        return sorted(pair for pair in found if pair[1] != IGNORE_INDEX)

    assert pairs(tmp_path) == pairs(cache)


@pytest.mark.parametrize("name", ["packing.json", "starts.bin", "lengths.bin", "borders.bin", "targets.bin"])
@pytest.mark.parametrize("damage", ["gone", "short", "flipped"])
def test_damage_is_repaired_when_preparing_and_refused_by_ranks(folder: Path, cache: Path, dataset: Path, name: str, damage: str) -> None:
    good, path = contents(folder), folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    if damage != "flipped":
        # A rank looks at sizes only; each byte was read before the ranks started.
        with pytest.raises(DataError, match="gone or is damaged") as caught:
            load_packing(folder)
        assert "run=" in str(caught.value.fix)
    lines: list[str] = []
    prepare_packing(cache, dataset, SEQ_LEN, lines.append)
    assert "making it again" in lines[0]
    assert contents(folder) == good


def test_ranks_say_so_when_there_is_no_index(dataset: Path, tmp_path: Path, cfg: Config) -> None:
    with pytest.raises(DataError, match="gone or is damaged"):
        training_rows(cfg, tmp_path, dataset)


def _prepare_and_die(dataset: Path, cache: Path, seconds: float) -> None:
    def slow(stream: Any, seq_len: int, folder: Path) -> None:
        build(stream, seq_len, folder)
        (folder / "packing.json").unlink()
        (cache / "half-way").touch()
        time.sleep(seconds)

    build, packing_index._build = packing_index._build, slow
    prepare_packing(cache, dataset, SEQ_LEN, lambda line: None)


def _prepare_counting(dataset: Path, cache: Path) -> None:
    def counted(stream: Any, seq_len: int, folder: Path) -> None:
        with open(cache / "builds", "a") as file:
            file.write("one\n")
        time.sleep(0.2)
        build(stream, seq_len, folder)

    build, packing_index._build = packing_index._build, counted
    prepare_packing(cache, dataset, SEQ_LEN, lambda line: None)


@pytest.mark.skipif(sys.platform != "linux", reason="kills a forked process")
def test_killed_half_way_it_leaves_nothing_that_counts_and_the_next_makes_it_anew(folder: Path, dataset: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_prepare_and_die, args=(dataset, tmp_path, 60.0))
    process.start()
    while not (tmp_path / "half-way").exists():
        assert process.is_alive()
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    place = packing_folder(tmp_path, dataset.name, SEQ_LEN)
    assert not place.exists()
    assert [path.name for path in place.parent.iterdir()] != []
    prepare_packing(tmp_path, dataset, SEQ_LEN, lambda line: None)
    assert contents(place) == contents(folder)
    assert [path.name for path in place.parent.iterdir()] == [place.name]


def test_of_several_at_once_one_works_and_the_others_wait(folder: Path, dataset: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_prepare_counting, args=(dataset, tmp_path)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "builds").read_text() == "one\n"
    assert contents(packing_folder(tmp_path, dataset.name, SEQ_LEN)) == contents(folder)


def test_a_cache_that_cannot_be_written_is_a_preflight_error(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_json", full)
    with pytest.raises(PreflightError, match="No space left") as caught:
        prepare_packing(tmp_path, dataset, SEQ_LEN, lambda line: None)
    assert "data.cache_dir" in str(caught.value.fix)


def test_documents_of_one_token_leave_nothing_to_predict(tmp_path: Path) -> None:
    config = DataConfig(name="letters", tokenizer="char", validation_fraction=0.5)
    dataset = prepare(config, tmp_path / "cache", lambda line: None)
    with pytest.raises(DataError, match="no document of the train part has two tokens") as caught:
        prepare_packing(tmp_path / "cache", dataset, SEQ_LEN, lambda line: None)
    assert caught.value.fix == "data.packing=concatenate"


def open_loader(rows: Any, **changes: Any) -> TokenLoader:
    settings = {"samples_per_step": SAMPLES_PER_STEP, "micro_batch_size": 2, "dp_rank": 0, "dp_size": 1}
    return TokenLoader(ShuffledRows(rows, SEED), **{**settings, **changes})


def steps(rows: Any, count: int, **changes: Any) -> list[StepBatch]:
    with open_loader(rows, **changes) as loader:
        return [loader.next_step() for _ in range(count)]


def real_rows(parts: list[StepBatch]) -> list[tuple[int, ...]]:
    """Returns the rows with targets of one step, over ranks, sorted."""
    found = []
    for part in parts:
        for micro in part.micro_batches:
            assert micro.positions_BT is not None
            assert len(micro.inputs) == 2
            for row in zip(*(tensor.tolist() for tensor in (micro.tokens_BT, micro.targets_BT, micro.positions_BT)), strict=True):
                if any(target != IGNORE_INDEX for target in row[1]):
                    found.append((*row[0], *row[1], *row[2]))
    return sorted(found)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_any_world_size_sees_the_same_packed_samples_and_divides_by_the_same_targets(
    folder: Path, cache: Path, dataset: Path, cfg: Config, dp_size: int
) -> None:
    rows = training_rows(cfg, cache, dataset)
    # Enough steps to pass the end of an epoch.
    count = len(rows) // SAMPLES_PER_STEP + 2
    reference = steps(rows, count)
    ranks = [steps(rows, count, dp_rank=rank, dp_size=dp_size, micro_batch_size=5) for rank in range(dp_size)]
    for step, alone in enumerate(reference):
        parts = [rank[step] for rank in ranks]
        assert sum(part.data_hash for part in parts) == alone.data_hash
        assert real_rows(parts) == real_rows([alone])
        targets = sum(int((micro.targets_BT != IGNORE_INDEX).sum()) for part in parts for micro in part.micro_batches)
        assert {part.num_targets for part in parts} == {targets}
        assert [part.cursor_after for part in parts] == [alone.cursor_after] * dp_size


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_resume_in_mid_epoch_at_another_world_size_has_the_same_hash_at_every_step(
    folder: Path, cache: Path, dataset: Path, cfg: Config, before: int, after: int
) -> None:
    rows = training_rows(cfg, cache, dataset)
    straight = [step.data_hash for step in steps(rows, 12)]
    first = [steps(rows, 5, dp_rank=rank, dp_size=before) for rank in range(before)]
    saved = json.loads(json.dumps(first[0][-1].cursor_after.to_json()))
    assert saved["samples"] % len(rows) > 0
    rest = [steps(rows, 7, dp_rank=rank, dp_size=after, micro_batch_size=3, cursor=Cursor.from_json(saved)) for rank in range(after)]
    found = [sum(rank[step].data_hash for rank in ranks) for ranks, count in ((first, 5), (rest, 7)) for step in range(count)]
    assert found == straight


def test_a_micro_batch_without_rows_has_the_form_of_the_others(folder: Path, cache: Path, dataset: Path, cfg: Config) -> None:
    (batch,) = steps(training_rows(cfg, cache, dataset), 1, dp_rank=3, dp_size=4, micro_batch_size=4)
    (padding,) = batch.micro_batches
    assert padding.positions_BT is not None
    assert padding.positions_BT.tolist() == [list(range(SEQ_LEN))] * 4
    assert (padding.targets_BT == IGNORE_INDEX).all()


def test_hash_depends_on_tokens_targets_and_positions(folder: Path, cache: Path, dataset: Path, cfg: Config) -> None:
    from factory_train.data.loader import _row_hash
    from factory_train.data.rows import Row

    row = training_rows(cfg, cache, dataset).row(0)
    assert row.positions_T is not None
    parts = [row.tokens_T, row.targets_T, row.positions_T]
    hashes = {_row_hash(0, row), _row_hash(1, row)}
    for index in range(3):
        changed = [part.copy() for part in parts]
        changed[index][2] += 1
        hashes.add(_row_hash(0, Row(*changed)))
    assert len(hashes) == 5


@pytest.fixture
def run_data(dataset: Path, tmp_path: Path) -> Path:
    copy_for_run(dataset, tmp_path / "data", 20 * SEQ_LEN + 1, packing="of a test")
    return tmp_path / "data"


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_validation_judges_every_pair_within_the_documents_once(run_data: Path, cfg: Config, dp_size: int) -> None:
    stream = TokenStream(run_data, "validation")
    rows = validation_rows(cfg, stream)
    ranks = [validation_batches(rows, micro_batch_size=2, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    found = []
    for batches in ranks:
        for micro in batches:
            real = micro.targets_BT != IGNORE_INDEX
            found += list(zip(micro.tokens_BT[real].tolist(), micro.targets_BT[real].tolist(), strict=True))
    tokens, starts = stream.slice(0, stream.num_tokens).tolist(), set(stream.document_starts().tolist())
    assert stream.num_tokens == 20 * SEQ_LEN + 1
    assert sorted(found) == sorted((tokens[at - 1], tokens[at]) for at in range(1, len(tokens)) if at not in starts)


def test_baselines_of_a_packed_run_are_those_of_pairs_within_documents(run_data: Path, dataset: Path) -> None:
    manifest = DataManifest.load(run_data)
    train, validation = TokenStream(dataset, "train"), TokenStream(run_data, "validation")
    everything = train.slice(0, train.num_tokens)
    bigram = KneserNeyBigram(everything, manifest.vocab_size, train.document_starts())
    tokens, starts = validation.slice(0, validation.num_tokens), validation.document_starts()
    inner = np.setdiff1d(np.arange(1, len(tokens)), starts)
    expected = float(-np.log(bigram.probability(tokens[inner - 1], tokens[inner])).mean())
    assert manifest.baselines["bigram_kneser_ney"] == pytest.approx(expected, rel=1e-12)
    over_borders = baselines(everything, tokens, manifest.vocab_size)
    assert manifest.baselines["bigram_kneser_ney"] < over_borders["bigram_kneser_ney"]


def test_a_run_keeps_to_the_rows_it_was_started_on(run_data: Path, dataset: Path) -> None:
    assert copy_for_run(dataset, run_data, 20 * SEQ_LEN + 1, packing="of a test").packing == "of a test"
    for other in ("of another version", None):
        with pytest.raises(DataError, match="started on other rows: of a test"):
            copy_for_run(dataset, run_data, 20 * SEQ_LEN + 1, packing=other)
