"""Checkpoints: any strategy loads what any other saved, nothing is half visible, nothing is silently damaged."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_ranks as ranks
import numpy
import pytest
import torch
from checkpoint_cases import found, new_run, save
from conftest import REPOSITORY
from hypothesis import given
from hypothesis.strategies import DataObject, data, integers, lists, permutations, tuples
from rank_pool import RankPool

from factory_train.checkpoint.entries import TensorEntry, choose_writes
from factory_train.checkpoint.format import Chunk, Manifest, TensorRecord, canonical_json, spread, tiling_problem
from factory_train.checkpoint.load import load_checkpoint, load_newest
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.distributed.box import Box
from factory_train.errors import ConfigError, ExitCode, IntegrityError, NotFoundError
from factory_train.run_dir import Attempt, RunDir

# --- boxes and plans


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", ["fsdp2", "fsdp4", "hsdp4"])
def test_local_boxes_hold_what_torch_put_there_and_tile_the_tensor(pool: RankPool, strategy: str) -> None:
    by_rank = pool.run(ranks.STRATEGIES[strategy], ranks.tiles, strategy)
    assert all(right for rows in by_rank for *_, right in rows)
    shards = 2 if strategy == "hsdp4" else len(by_rank)
    for index, (name, shape) in enumerate(ranks.SHAPES.items()):
        boxes = [Box(rows[index][1], rows[index][2]) for rows in by_rank[:shards]]
        assert tiling_problem(shape, boxes) is None, name
    if strategy == "fsdp4":
        assert any(box[2] == (0, 4) for rows in by_rank for box in rows if box[0] == "single")


def test_tiling_check_finds_holes_overlaps_and_strays() -> None:
    quarters = [Box((row, column), (2, 3)) for row in (0, 2) for column in (0, 3)]
    assert tiling_problem((4, 6), quarters) is None
    assert "hold 18 of 24" in (tiling_problem((4, 6), quarters[1:]) or "")
    assert "overlap" in (tiling_problem((4, 6), [*quarters[1:], Box((1, 0), (2, 3))]) or "")
    assert "outside" in (tiling_problem((4, 6), [Box((3, 0), (2, 6))]) or "")
    assert tiling_problem((), [Box((), ())]) is None
    assert "hold 2 of 1" in (tiling_problem((), [Box((), ())] * 2) or "")
    assert tiling_problem((0, 3), []) is None


def test_replicated_tensors_are_written_by_exactly_one_copy_each_and_spread_by_bytes() -> None:
    sizes = [1000, 300, 299, 200, 150, 50, 1]
    tensors = {f"t{index}": torch.zeros(size) for index, size in enumerate(sizes)}

    def plan(copy: int) -> list[str]:
        entries = [
            TensorEntry(name, "weights", tensor, Box.whole((len(tensor),)), (len(tensor),), copy, 2) for name, tensor in tensors.items()
        ]
        return [entry.name for entry in choose_writes(entries)]

    plans = [plan(0), plan(1)]
    assert sorted(plans[0] + plans[1]) == sorted(tensors)
    loads = [sum(len(tensors[name]) for name in chosen) for chosen in plans]
    assert abs(loads[0] - loads[1]) <= 1
    assert spread([], 3) == []


# --- round trips


@pytest.fixture(scope="module")
def saved_by(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """One run a strategy, saved by real ranks."""
    runs = {}
    for seed, (strategy, world) in enumerate(ranks.STRATEGIES.items(), start=1):
        attempt = new_run(tmp_path_factory.mktemp("saved"), strategy)
        assert set(pool.run(world, ranks.save, strategy, attempt, 10, seed)) == {"step-00000010"}
        runs[strategy] = attempt.run
    return runs


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", list(ranks.STRATEGIES))
def test_any_strategy_and_world_size_loads_what_any_other_saved_bit_for_bit(
    pool: RankPool, saved_by: dict[str, RunDir], strategy: str
) -> None:
    differences = pool.run(ranks.STRATEGIES[strategy], ranks.load_and_compare, strategy, list(saved_by.values()))
    assert differences == [[]] * ranks.STRATEGIES[strategy]


@pytest.mark.cluster
@pytest.mark.parametrize("strategy", list(ranks.STRATEGIES))
def test_each_element_is_on_disk_once_and_the_work_is_shared(saved_by: dict[str, RunDir], strategy: str) -> None:
    folder = saved_by[strategy].checkpoints / "step-00000010"
    manifest = CheckpointReader(folder).manifest
    files = {name: record for name, record in manifest.contents.files.items() if name.endswith(".safetensors")}
    values = ranks.reference(0).values()
    assert sum(record.bytes - record.head_bytes for record in files.values()) == sum(value.nbytes for value in values)
    assert {path.name: path.stat().st_size for path in folder.glob("*.safetensors")} == {
        name: record.bytes for name, record in files.items()
    }
    # Of nine rows over four FSDP2 ranks the last gets none; a rank with nothing to write has no file.
    assert len(files) == (3 if strategy == "fsdp4" else ranks.STRATEGIES[strategy])
    if strategy.startswith("ddp"):
        # Copies divide the work evenly; shards are what they are.
        data = [record.bytes - record.head_bytes for record in files.values()]
        assert max(data) - min(data) <= max(value.nbytes for value in values)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "MANIFEST.json", "state.json"])


@pytest.mark.cluster
def test_save_and_load_unpickle_nothing(pool: RankPool, attempt: Attempt) -> None:
    assert pool.run(2, ranks.without_pickle, attempt) == [[], []]


@pytest.mark.cluster
def test_the_script_in_the_docs_reads_a_checkpoint_of_two_fsdp_ranks(saved_by: dict[str, RunDir], tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/checkpoint-format.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "read.py").write_text(blocks[0])
    run = saved_by["fsdp2"]
    seed = CheckpointReader(run.checkpoints / "step-00000010").state["seed"]
    for section, name in (("optimizer/exp_avg", "embed"), ("weights", "scale")):
        command = [sys.executable, "read.py", str(run.checkpoints / "step-00000010"), section, name, "out.npy"]
        subprocess.run(command, cwd=tmp_path, check=True, env={"PATH": ""})
        assert numpy.array_equal(numpy.load(tmp_path / "out.npy"), ranks.reference(seed)[section, name].numpy())


def test_a_box_is_read_from_the_files_that_share_it_only(saved_by: dict[str, RunDir], tmp_path: Path) -> None:
    copy = shutil.copytree(saved_by["fsdp4"].checkpoints / "step-00000010", tmp_path / "copy")
    reader = CheckpointReader(copy)
    whole = reader.read("weights", "embed")
    (copy / "rank-00002.safetensors").unlink()
    # Nine rows over four ranks: 3, 3, 3, 0.
    part = CheckpointReader(copy).read_box("weights", "embed", Box((2, 1), (3, 2)))
    assert torch.equal(part, whole[2:5, 1:3])
    with pytest.raises(IntegrityError, match=r"rank-00002\.safetensors"):
        CheckpointReader(copy).read_box("weights", "embed", Box((5, 0), (2, 4)))


def test_weights_alone_load_where_the_optimizer_is_another(attempt: Attempt) -> None:
    save(attempt, 1)
    weights = {key: torch.zeros_like(value) for key, value in ranks.reference(0).items() if key[0] == "weights"}
    other = {**weights, ("optimizer/momentum", "embed"): torch.zeros(9, 4)}
    loaded = load_newest(attempt.run, ranks.entries_of(other))
    assert loaded is not None
    assert loaded.state == {"step": 1, "seed": 1}
    assert (loaded.sections, loaded.has_optimizer) == (("weights",), False)
    assert ranks.differences(weights, {key: ranks.reference(1)[key] for key in weights}) == []
    assert not other["optimizer/momentum", "embed"].any()
    with pytest.raises(ConfigError, match="not in the checkpoint: optimizer/momentum embed"):
        load_newest(attempt.run, ranks.entries_of(other), sections=("weights", "optimizer/momentum"))


def test_a_model_that_changed_is_told_by_name_and_shape(attempt: Attempt) -> None:
    path = save(attempt, 1)
    state = {key: torch.zeros_like(value) for key, value in ranks.reference(0).items()}
    state["weights", "wide"] = torch.zeros(5, 8)
    state["weights", "added"] = state.pop(("weights", "bias"))
    with pytest.raises(ConfigError) as raised:
        load_checkpoint(CheckpointReader(path), ranks.entries_of(state))
    assert "weights wide is [5, 7] in the checkpoint, [5, 8] in the model" in str(raised.value)
    assert "not in the checkpoint: weights added" in str(raised.value)
    assert "not in the model: weights bias" in str(raised.value)
    assert raised.value.exit_code == ExitCode.USAGE
    assert not state["weights", "embed"].any()


def test_a_newer_format_is_refused_as_such(attempt: Attempt) -> None:
    path = save(attempt, 1) / "MANIFEST.json"
    value = json.loads(path.read_bytes())
    value["format_version"] = 2
    del value["xxh3"]
    import xxhash

    value["xxh3"] = xxhash.xxh3_64_hexdigest(canonical_json(value))
    path.write_bytes(canonical_json(value))
    with pytest.raises(ConfigError, match="upgrade factory_train"):
        found(attempt.run)


def test_a_run_without_checkpoints_loads_nothing(attempt: Attempt) -> None:
    assert load_newest(attempt.run, []) is None
    with pytest.raises(NotFoundError):
        open_checkpoint(attempt.run)


def test_manifest_survives_encoding(saved_by: dict[str, RunDir]) -> None:
    raw = (saved_by["fsdp4"].checkpoints / "step-00000010" / "MANIFEST.json").read_bytes()
    assert Manifest.decode(raw, "here").encode() == raw


def test_the_oldest_checkpoint_still_loads(attempt: Attempt) -> None:
    """tests/data/checkpoint-v1 was written by the first version of the format: `reference(7)` by two FSDP2 ranks."""
    attempt.run.checkpoints.mkdir()
    shutil.copytree(REPOSITORY / "tests/data/checkpoint-v1", attempt.run.checkpoints / "step-00000007")
    assert found(attempt.run) == (7, [], [])


# --- many chunks

NUM_ROWS = 6144


@pytest.mark.parametrize(("saved", "loaded"), [(512, 512), (512, 384), (64, 1024)])
def test_finding_the_chunks_of_all_boxes_takes_about_as_many_looks_as_there_are_chunks_and_boxes(
    monkeypatch: pytest.MonkeyPatch, saved: int, loaded: int
) -> None:
    def rows(parts: int) -> list[Box]:
        height = -(-NUM_ROWS // parts)
        return [Box((start, 0), (min(height, NUM_ROWS - start), 4)) for start in range(0, NUM_ROWS, height)]

    chunks = tuple(Chunk("file", str(box.offset), box.offset, box.shape, "") for box in rows(saved))
    record = TensorRecord("float32", (NUM_ROWS, 4), chunks)
    looks, really = [0], Box.intersection

    def counting(self: Box, other: Box) -> Box | None:
        looks[0] += 1
        return really(self, other)

    monkeypatch.setattr(Box, "intersection", counting)
    for box in rows(loaded):
        assert sum(common.numel for _, common in record.overlapping(box)) == box.numel
    print(f"{len(rows(saved))} chunks, {len(rows(loaded))} boxes: {looks[0]} looks")
    assert looks[0] <= 3 * (len(rows(saved)) + len(rows(loaded)))


@given(data())
def test_boxes_are_found_however_a_tensor_is_cut(draw: DataObject) -> None:
    shape = draw.draw(tuples(integers(1, 9), integers(1, 9)))
    cuts = [sorted({0, size, *draw.draw(lists(integers(0, size), max_size=3))}) for size in shape]
    boxes = [Box((a, c), (b - a, d - c)) for a, b in itertools.pairwise(cuts[0]) for c, d in itertools.pairwise(cuts[1])]
    chunks = tuple(Chunk("file", str(box.offset), box.offset, box.shape, "") for box in draw.draw(permutations(boxes)))
    start = tuple(draw.draw(integers(0, size - 1)) for size in shape)
    box = Box(start, tuple(draw.draw(integers(1, size - first)) for size, first in zip(shape, start, strict=True)))
    expected = {chunk.key: common for chunk in chunks if (common := chunk.box.intersection(box))}
    assert {chunk.key: common for chunk, common in TensorRecord("float32", shape, chunks).overlapping(box)} == expected


# --- loading less than everything


def test_a_load_that_is_not_strict_fills_what_fits_and_names_the_rest(attempt: Attempt) -> None:
    path = save(attempt, 1)
    state = {key: torch.full_like(value, 7) for key, value in ranks.reference(0).items() if key[0] == "weights"}
    state["weights", "wide"], state["weights", "added"] = torch.full((5, 8), 7.0), torch.full((2,), 7.0)
    del state["weights", "bias"]
    with CheckpointReader(path) as reader:
        loaded = load_checkpoint(reader, ranks.entries_of(state), sections=("weights",), strict=False)
    assert loaded.left_alone == ("weights added", "weights wide")
    assert bool((state["weights", "wide"] == 7).all() and (state["weights", "added"] == 7).all())
    assert torch.equal(state["weights", "embed"], ranks.reference(1)["weights", "embed"])


@pytest.mark.cluster
@pytest.mark.parametrize(("strategy", "fits"), [("fsdp2", True), ("single", True), ("fsdp4", False)])
def test_the_native_encoding_is_taken_only_where_every_rank_finds_its_own_boxes(
    pool: RankPool, attempt: Attempt, strategy: str, fits: bool
) -> None:
    pool.run(2, ranks.save_with_native, "fsdp2", attempt)
    results = pool.run(ranks.STRATEGIES[strategy], ranks.load_with_native, strategy, attempt.run)
    assert [native for native, _ in results] == [fits] * len(results)
    assert all(differences == [] for _, differences in results)


def test_a_checkpoint_with_a_native_encoding_loads_where_nobody_knows_it(attempt: Attempt, pool: RankPool) -> None:
    pool.run(2, ranks.save_with_native, "fsdp2", attempt)
    assert found(attempt.run) == (1, [], [])
