"""Damage of any kind is noticed before anything is loaded, named, and passed over."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import checkpoint_ranks as ranks
import pytest
import torch
from checkpoint_cases import flip, found, new_run
from rank_pool import RankPool

from factory_train.checkpoint.load import load_checkpoint
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.errors import ExitCode, IntegrityError
from factory_train.run_dir import RunDir


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> RunDir:
    """A run with checkpoints of steps 1 and 2 by two FSDP2 ranks."""
    attempt = new_run(tmp_path_factory.mktemp("healthy"))
    for step in (1, 2):
        pool.run(2, ranks.save, "fsdp2", attempt, step, step)
    return attempt.run


FILES = ("MANIFEST.json", "state.json", "rank-00000.safetensors", "rank-00001.safetensors")


@pytest.fixture
def run(healthy: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(healthy.path, tmp_path / healthy.name))


@pytest.mark.cluster
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_detected_and_the_file_named(run: RunDir, name: str) -> None:
    folder = run.checkpoints / "step-00000002"
    intact = (folder / name).read_bytes()
    positions = range(0, len(intact), 1 if len(intact) < 1000 else 17)
    for position in positions:
        flip(folder / name, position)
        with pytest.raises(IntegrityError) as raised:
            CheckpointReader(folder).verify()
        assert raised.value.where == str(folder / name), position
        (folder / name).write_bytes(intact)
    CheckpointReader(folder).verify()
    print(f"{name}: {len(positions)} flipped bits in {len(intact)} bytes, all detected")


def truncate(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


def lengthen(folder: Path, name: str) -> None:
    with open(folder / name, "ab") as file:
        file.write(b"\0")


def take_from_other_save(folder: Path, name: str) -> None:
    shutil.copy(folder.parent / "step-00000001" / name, folder / name)


def delete(folder: Path, name: str) -> None:
    (folder / name).unlink()


def flip_one(folder: Path, name: str) -> None:
    flip(folder / name, (folder / name).stat().st_size // 2)


@pytest.mark.cluster
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_one, truncate, lengthen, take_from_other_save, delete])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(run: RunDir, damage: Callable[[Path, str], None], name: str) -> None:
    folder = run.checkpoints / "step-00000002"
    damage(folder, name)
    step, notes, differences = found(run)
    assert (step, differences) == (1, [])
    if (damage, name) == (delete, "MANIFEST.json"):
        # Without its manifest a folder is no checkpoint at all.
        assert notes == []
        return
    # A foreign manifest is whole in itself: then it is the files that do not fit.
    culprit = "step-00000002/" if (damage, name) == (take_from_other_save, "MANIFEST.json") else f"step-00000002/{name}"
    assert len(notes) == 1
    assert culprit in notes[0]
    reader = open_checkpoint(run, sections=None)
    assert (reader.step, len(reader.notes)) == (1, 1)
    with pytest.raises(IntegrityError):
        open_checkpoint(run, 2, sections=None)


@pytest.mark.cluster
def test_swapped_files_are_detected(run: RunDir) -> None:
    folder = run.checkpoints / "step-00000002"
    (folder / "rank-00000.safetensors").rename(folder / "spare")
    (folder / "rank-00001.safetensors").rename(folder / "rank-00000.safetensors")
    (folder / "spare").rename(folder / "rank-00001.safetensors")
    with pytest.raises(IntegrityError, match="rank-0000"):
        CheckpointReader(folder).verify()


@pytest.mark.cluster
def test_all_ranks_pass_over_what_one_of_them_found_damaged(pool: RankPool, run: RunDir) -> None:
    flip(run.checkpoints / "step-00000002" / "rank-00001.safetensors", -1)
    results = pool.run(4, ranks.load_notes, "fsdp4", run)
    assert [(step, differences) for step, _, differences in results] == [(1, [])] * 4
    assert all("rank-00001.safetensors" in notes[0] for _, notes, _ in results)
    # The note says in which tensor.
    assert "tensor '" in results[0][1][0]


@pytest.mark.cluster
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(run: RunDir) -> None:
    for step in (1, 2):
        flip(run.checkpoints / f"step-{step:08d}" / "state.json", 3)
    with pytest.raises(IntegrityError, match="every checkpoint is damaged") as raised:
        found(run)
    assert raised.value.exit_code == ExitCode.INTEGRITY


@pytest.mark.cluster
def test_nothing_is_touched_before_everything_is_verified(run: RunDir) -> None:
    flip(run.checkpoints / "step-00000002" / "rank-00001.safetensors", -1)
    state = {key: torch.full_like(value, 7) for key, value in ranks.reference(0).items()}
    with pytest.raises(IntegrityError):
        load_checkpoint(CheckpointReader(run.checkpoints / "step-00000002"), ranks.entries_of(state))
    assert all(bool((value == 7).all()) for value in state.values())


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (self.path, "w")


@pytest.mark.cluster
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_any_file_is_refused_and_never_run(run: RunDir, tmp_path: Path, name: str) -> None:
    path = run.checkpoints / "step-00000002" / name
    evil = pickle.dumps(Evil(str(tmp_path / "owned")))
    # Of the right length too: only the bytes are wrong.
    for data in (evil, evil.ljust(path.stat().st_size, b"\0")[: path.stat().st_size]):
        path.write_bytes(data)
        assert found(run)[0] == 1
        with pytest.raises(IntegrityError):
            open_checkpoint(run, 2, sections=None)
    assert not (tmp_path / "owned").exists()
