"""Checkpoints: any strategy loads what any other saved, nothing is half visible, nothing is silently damaged."""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import checkpoint_ranks as ranks
import numpy
import pytest
import torch
from conftest import REPOSITORY
from rank_pool import RankPool

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.entries import TensorEntry, choose_writes
from factory_train.checkpoint.files import DurableFiles
from factory_train.checkpoint.format import Manifest, canonical_json, spread, tiling_problem
from factory_train.checkpoint.load import load_checkpoint, load_newest
from factory_train.checkpoint.reader import CheckpointReader, open_checkpoint
from factory_train.config import Config
from factory_train.distributed.box import Box
from factory_train.errors import CheckpointError, ConfigError, ExitCode, FencedError, IntegrityError, NotFoundError
from factory_train.run_dir import Attempt, RunDir


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    pool = RankPool(tmp_path_factory.mktemp("pool"), "checkpoint_ranks")
    yield pool
    pool.close()


def new_run(folder: Path, name: str = "run") -> Attempt:
    return RunDir.create(folder, "test", name).new_attempt(Config(recipe="test"))


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return new_run(tmp_path)


def next_attempt(attempt: Attempt) -> Attempt:
    return attempt.run.new_attempt(Config(recipe="test"))


def save(attempt: Attempt, step: int, *, seed: int | None = None, **kwargs: object) -> Path:
    """Saves `reference(seed)` (default: seed = step) from one process."""
    return attempt.run.checkpoints / ranks.save(0, 1, "single", attempt, step, step if seed is None else seed, **kwargs)


def found(run: RunDir) -> tuple[int, list[str], list[str]]:
    """Returns the step that load finds, its notes, and what differs from what was saved then."""
    return ranks.load_notes(0, 1, "single", run)


def names(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.checkpoints.iterdir())


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


# --- commit


def history(folder: Path) -> Attempt:
    """Returns a run with checkpoints of steps 1 and 2."""
    attempt = new_run(folder)
    save(attempt, 1)
    save(attempt, 2)
    return attempt


def test_a_crash_at_any_point_leaves_the_old_checkpoint_or_the_new_one_whole(tmp_path: Path) -> None:
    original = history(tmp_path / "original").run
    points: list[tuple[str, str, str]] = []
    rehearsal = shutil.copytree(original.path, tmp_path / "rehearsal")
    save(next_attempt(RunDir(rehearsal).attempts()[0]), 3, files=DurableFiles(ranks.counting(points)))
    committed = points.index(("after", "rename", "step-00000003"))
    assert {action for _, action, _ in points} == {
        *("mkdir", "create", "write", "fsync", "fsync folder", "rename", "point", "unlink", "rmdir")
    }
    for crash_at in range(len(points)):
        run = RunDir(shutil.copytree(original.path, tmp_path / f"crash-{crash_at}"))
        countdown = itertools.count()

        def crash(*moment: object, at: int = crash_at, countdown: Iterator[int] = countdown) -> None:
            if next(countdown) == at:
                raise ranks.Crash

        with pytest.raises(ranks.Crash):
            save(next_attempt(run.attempts()[0]), 3, files=DurableFiles(crash))
        # The rename is the moment that counts: from then on the new one is found, before it the old one.
        assert found(run) == (3 if crash_at >= committed else 2, [], []), points[crash_at]
        for info in list_checkpoints(run):
            CheckpointReader(info.path).verify()
        # Nothing that is left hinders the next attempt, and all of it goes.
        save(next_attempt(run.attempts()[0]), 4)
        assert found(run) == (4, [], [])
        assert [info.step for info in list_checkpoints(run)] == [4, 3 if crash_at >= committed else 2]
        assert len(names(run)) == 3
        shutil.rmtree(run.path)
    print(f"{len(points)} points of a save tried")


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("crashing_rank", "moment"),
    [(1, ("after", "create")), (1, ("before", "fsync")), (0, ("before", "fsync folder")), (0, ("before", "rename"))],
)
def test_a_rank_that_dies_in_a_save_leaves_the_old_checkpoint(
    pool: RankPool, attempt: Attempt, crashing_rank: int, moment: tuple[str, str]
) -> None:
    pool.run(2, ranks.save, "fsdp2", attempt, 1, 1)
    ends = pool.run(2, ranks.save_with_crash, attempt, crashing_rank, moment)
    assert ends[crashing_rank] == "crash"
    assert ends[1 - crashing_rank] == "lost its peer"
    assert found(attempt.run) == (1, [], [])
    later = next_attempt(attempt)
    assert set(pool.run(2, ranks.save, "fsdp2", later, 2, 2)) == {"step-00000002"}
    assert names(attempt.run) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("failing_rank", "action", "error", "word"),
    [
        (1, "write", OSError(errno.ENOSPC, "No space left on device"), "No space left"),
        (0, "create", PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (1, "fsync", ValueError("not an input/output error"), "ValueError"),
        (0, "rename", OSError(errno.EIO, "Input/output error"), "Input/output error"),
    ],
)
def test_a_failure_on_one_rank_is_the_same_error_on_all_and_the_next_save_works(
    pool: RankPool, attempt: Attempt, failing_rank: int, action: str, error: Exception, word: str
) -> None:
    pool.run(2, ranks.save, "fsdp2", attempt, 1, 1)
    raised = pool.run(2, ranks.save_with_failure, attempt, failing_rank, action, error)
    assert raised[0] == raised[1]
    assert raised[0][0] == "CheckpointError"
    assert f"rank {failing_rank}" in raised[0][1]
    assert word in raised[0][1]
    # The space is given back at once, and nothing is left of the attempt to save.
    assert names(attempt.run) == ["latest", "step-00000001"]
    assert found(attempt.run) == (1, [], [])
    pool.run(2, ranks.save, "fsdp2", attempt, 2, 2)
    assert found(attempt.run) == (2, [], [])


def test_state_that_json_cannot_hold_is_refused_and_changes_nothing(attempt: Attempt) -> None:
    save(attempt, 1)
    for value in (torch.zeros(2), float("nan")):
        with pytest.raises(CheckpointError, match="JSON"):
            save(attempt, 2, state={"cursor": value})
    assert names(attempt.run) == ["latest", "step-00000001"]


def tree(run: RunDir) -> dict[str, bytes]:
    return {str(path.relative_to(run.path)): path.read_bytes() for path in sorted(run.checkpoints.rglob("*")) if path.is_file()}


def test_an_attempt_that_was_superseded_changes_nothing(tmp_path: Path) -> None:
    attempt = history(tmp_path)
    next_attempt(attempt)
    before = tree(attempt.run)
    with pytest.raises(FencedError):
        save(attempt, 3, keep_last=1)
    assert tree(attempt.run) == before


@pytest.mark.parametrize("moment", [("after", "mkdir"), ("after", "create"), ("before", "fsync folder")])
def test_an_attempt_superseded_in_mid_save_commits_moves_and_deletes_nothing(tmp_path: Path, moment: tuple[str, str]) -> None:
    attempt = history(tmp_path)
    before = tree(attempt.run)

    def supersede(when: str, action: str, path: Path) -> None:
        if (when, action) == moment and attempt.is_newest():
            next_attempt(attempt)

    with pytest.raises(FencedError):
        save(attempt, 3, keep_last=1, files=DurableFiles(supersede))
    after = tree(attempt.run)
    assert {name: data for name, data in after.items() if ".tmp-" not in name} == before
    assert found(attempt.run) == (2, [], [])


def test_a_rank_that_wakes_up_just_before_its_rename_finds_its_draft_gone(tmp_path: Path) -> None:
    attempt = history(tmp_path)

    def overtake(when: str, action: str, path: Path) -> None:
        if (when, action) == ("before", "rename") and attempt.is_newest():
            save(next_attempt(attempt), 3, seed=33)

    with pytest.raises(CheckpointError):
        save(attempt, 3, files=DurableFiles(overtake))
    assert CheckpointReader(attempt.run.checkpoints / "step-00000003").manifest.attempt == 2
    assert found(attempt.run) == (3, [], [])
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000003"]


# --- which checkpoint is the newest, and which may go


def test_retention_keeps_the_newest_and_removes_what_dead_attempts_left(attempt: Attempt) -> None:
    for step in (1, 2, 3):
        save(attempt, step, keep_last=2)
    assert names(attempt.run) == ["latest", "step-00000002", "step-00000003"]
    for name in ("step-00000004.tmp-0001", "step-00000001.removed-0001"):
        (attempt.run.checkpoints / name).mkdir()
        (attempt.run.checkpoints / name / "rank-00000.safetensors").write_bytes(b"half")
    save(next_attempt(attempt), 4, keep_last=1)
    assert names(attempt.run) == ["latest", "step-00000004"]
    assert (attempt.run.checkpoints / "latest").read_text() == "step-00000004\n"


def test_only_complete_folders_count_whatever_latest_says(attempt: Attempt) -> None:
    save(attempt, 1)
    save(attempt, 2)
    (attempt.run.checkpoints / "step-00000002" / "MANIFEST.json").unlink()
    assert (attempt.run.checkpoints / "latest").read_text() == "step-00000002\n"
    assert [info.step for info in list_checkpoints(attempt.run)] == [1]
    (attempt.run.checkpoints / "latest").write_text("../../elsewhere\n")
    assert found(attempt.run) == (1, [], [])


def test_a_step_reached_again_is_never_overwritten_and_the_rerun_is_the_newest(attempt: Attempt) -> None:
    save(attempt, 1, keep_last=9)
    damaged = save(attempt, 2, keep_last=9)
    flip(damaged / "rank-00000.safetensors", -1)
    before = {name: data for name, data in tree(attempt.run).items() if "step-" in name}
    later = next_attempt(attempt)
    assert found(attempt.run)[0] == 1
    assert save(later, 2, keep_last=9).name == "step-00000002.r1"
    assert found(attempt.run) == (2, [], [])
    assert save(later, 3, keep_last=9).name == "step-00000003.r1"
    assert [info.path.name for info in list_checkpoints(attempt.run)] == [
        *("step-00000003.r1", "step-00000002.r1", "step-00000002", "step-00000001")
    ]
    assert before.items() <= tree(attempt.run).items()


def test_the_same_step_saved_twice_is_there_once_if_nothing_differs(attempt: Attempt) -> None:
    first = save(attempt, 5)
    assert save(next_attempt(attempt), 5) == first
    assert names(attempt.run) == ["latest", "step-00000005"]
    assert save(attempt.run.attempts()[-1], 5, seed=6).name == "step-00000005.r1"
    assert found(attempt.run)[2] == []


# --- damage


def flip(path: Path, position: int) -> None:
    """Changes one bit."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


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


def test_manifest_survives_encoding(healthy: RunDir) -> None:
    raw = (healthy.checkpoints / "step-00000002" / "MANIFEST.json").read_bytes()
    assert Manifest.decode(raw, "here").encode() == raw
