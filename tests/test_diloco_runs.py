"""Runs of islands: resumed anywhere, and whatever an island is inside."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from island_processes import run_islands, start_run
from test_training import small_config

from factory_train.checkpoint.compare import compare
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.config import Config
from factory_train.diloco_config import DilocoConfig
from factory_train.gangs import island_names, island_run
from factory_train.run_dir import RunDir

STEPS = 13


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(subprocess.__file__).read_text())
    return path


def island_settings(text_file: Path, root: Path, layout: str = "single", precision: str = "float32", **diloco) -> Config:
    cfg = small_config(text_file, layout, precision)
    cfg.recipe, cfg.train.steps, cfg.train.deterministic = "islands", STEPS, True
    cfg.data.cache_dir = str(root / "data")
    settings = {"islands": 2, "sync_every": 4, "fragments": 2, "delay": 1, "payload": "int4", "silence_s": 15.0, "grace_s": 60.0}
    cfg.diloco = DilocoConfig(**settings | diloco)
    return cfg


def curve(run: RunDir, island: str) -> list[tuple]:
    """What an island computed, step by step; of attempts that began before others had ended, the last word counts."""
    rows = [row for row in island_run(run, island).metrics() if row["kind"] == "train"]
    return [(row["step"], row["loss"], row["grad_norm"], row["data_hash"], row["lr"]) for row in rows]


def differences(a: RunDir, b: RunDir) -> list[str]:
    """How the outer states at the end of two runs differ."""
    paths = [run.checkpoints / f"step-{STEPS:08d}" for run in (a, b)]
    with CheckpointReader(paths[0]) as first, CheckpointReader(paths[1]) as second:
        return [str(found) for found in compare(first, second) if not found.equal]


@pytest.mark.parametrize("stops", [(5, 6), pytest.param((2, 3, 4, 7, 8, 9), marks=pytest.mark.long)], ids=["two", "others"])
def test_resumed_at_any_step_of_two_periods_a_run_is_bit_identical(text_file: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    """Also inside of an overlap window, with narrow payloads and error feedback."""
    cfg = island_settings(text_file, tmp_path)
    undisturbed = start_run(tmp_path, "undisturbed", cfg).run
    stopped = {stop: start_run(tmp_path, f"stopped{stop}", cfg).run for stop in stops}
    orders = [{"run_dir": str(undisturbed.path)}]
    for stop, run in stopped.items():
        orders += [{"run_dir": str(run.path), "stop_at": stop}, {"run_dir": str(run.path)}]
    run_islands(orders, islands=2)
    for stop, run in stopped.items():
        for island in island_names(2):
            events = island_run(run, island).last_attempt().events()
            assert next(event["step"] for event in events if event["event"] == "island-loaded") == stop
            assert curve(run, island) == curve(undisturbed, island), f"stopped after step {stop}"
        assert not differences(run, undisturbed), f"stopped after step {stop}"


@pytest.mark.parametrize("layout", [pytest.param("ddp2", marks=pytest.mark.long), "fsdp2"])
def test_islands_of_several_ranks_resume_inside_of_an_overlap_window(text_file: Path, tmp_path: Path, layout: str) -> None:
    cfg = island_settings(text_file, tmp_path, layout)
    cfg.train.micro_batch_size = 2
    undisturbed, stopped = (start_run(tmp_path, name, cfg).run for name in ("undisturbed", "stopped"))
    run_islands(
        [{"run_dir": str(undisturbed.path)}, {"run_dir": str(stopped.path), "stop_at": 6}, {"run_dir": str(stopped.path)}],
        islands=2,
        ranks=2,
    )
    for island in island_names(2):
        events = island_run(stopped, island).last_attempt().events()
        assert next(event["step"] for event in events if event["event"] == "island-loaded") == 6
        assert curve(stopped, island) == curve(undisturbed, island)
    assert not differences(stopped, undisturbed)


def flip_a_byte(run: RunDir, step: int) -> None:
    (path, *_) = sorted((run.checkpoints / f"step-{step:08d}").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-100] ^= 8
    path.write_bytes(content)


@pytest.mark.long
def test_damaged_checkpoints_are_passed_over(text_file: Path, tmp_path: Path) -> None:
    """One of the run: all begin from the one before, bit for bit. One of an island: it begins from the outer parameters."""
    cfg = island_settings(text_file, tmp_path)
    cfg.checkpoint.every_steps, cfg.checkpoint.keep_last = 4, 9
    undisturbed, damaged, half = (start_run(tmp_path, name, cfg).run for name in ("undisturbed", "damaged", "half"))
    run_islands([{"run_dir": str(undisturbed.path)}, *({"run_dir": str(run.path), "stop_at": 10} for run in (damaged, half))], islands=2)
    flip_a_byte(damaged, 10)
    flip_a_byte(island_run(half, "island-1"), 10)
    run_islands([{"run_dir": str(damaged.path), "before": 1}, {"run_dir": str(half.path), "before": 1}], islands=2)
    events = island_run(damaged, "island-0").last_attempt().events()
    assert next(event["step"] for event in events if event["event"] == "island-loaded") == 8
    assert not differences(damaged, undisturbed)
    events = island_run(half, "island-1").last_attempt().events()
    assert any(event["event"] == "checkpoint-skipped" for event in events)
    assert differences(half, undisturbed)
    assert curve(half, "island-1")[-1][0] == STEPS


@pytest.fixture(scope="module")
def layouts(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """The same run of two islands in float64, each island being one rank, or two ranks in three ways."""
    root = tmp_path_factory.mktemp("layouts")
    runs = {}
    for layout in ("single", "ddp2", "fsdp2"):
        cfg = island_settings(text_file, root, layout, "float64", payload="none")
        # Islands have half of the batch, in micro-batches of the same sizes.
        cfg.train.micro_batch_size = 2
        runs[layout] = start_run(root, layout, cfg).run
    run_islands([{"run_dir": str(runs["single"].path)}], islands=2)
    run_islands([{"run_dir": str(runs[layout].path)} for layout in ("ddp2", "fsdp2")], islands=2, ranks=2)
    return runs


@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_what_is_inside_of_an_island_does_not_change_the_run(layouts: dict[str, RunDir], layout: str) -> None:
    for island in island_names(2):
        expected, found = curve(layouts["single"], island), curve(layouts[layout], island)
        assert [row[3] for row in found] == [row[3] for row in expected], "the same samples at each step"
        worst = max(abs(a[1] - b[1]) / a[1] for a, b in zip(expected, found, strict=True))
        assert worst <= 1e-10
    paths = [layouts[name].checkpoints / f"step-{STEPS:08d}" for name in ("single", layout)]
    with CheckpointReader(paths[0]) as first, CheckpointReader(paths[1]) as second:
        for section in ("weights", "outer/momentum"):
            for name in first.names(section):
                gap = (first.read(section, name) - second.read(section, name)).abs().max()
                assert gap <= 1e-10, f"{section} {name}"


def test_islands_see_the_samples_of_data_parallel_training_each_once(text_file: Path, layouts: dict[str, RunDir], tmp_path: Path) -> None:
    """The hashes of all samples add up to those of an ordinary run over as many samples, up to the last whole lease."""
    from gang import run_gang
    from gang import start_run as start_plain

    cfg = small_config(text_file, "single", "float64")
    cfg.data.cache_dir, cfg.train.steps = str(tmp_path / "data"), STEPS
    plain = start_plain(tmp_path, "plain", cfg)
    run_gang([(plain, 1)])
    whole = STEPS - STEPS % 4
    of_plain = sum(row["data_hash"] for row in plain.run.metrics() if row["kind"] == "train" and row["step"] <= whole)
    of_islands = sum(row[3] for island in island_names(2) for row in curve(layouts["single"], island) if row[0] <= whole)
    assert of_islands == of_plain


def test_evaluation_and_export_take_the_outer_parameters(layouts: dict[str, RunDir]) -> None:
    from factory_train.recipes.pretrain import finish

    run = layouts["single"]
    attempt = run.last_attempt()
    cfg = attempt.config()
    finish(cfg, attempt)
    measured = next(row for row in reversed(run.metrics()) if row["kind"] == "validation")
    evaluation = run.evaluation / f"step-{STEPS:08d}.json"
    assert abs(json.loads(evaluation.read_text())["loss"] - measured["loss"]) < 1e-9
