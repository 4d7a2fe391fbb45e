"""A run on packed documents, from the command to the report, and the same run over any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import command
import pytest
import stories_plugin  # noqa: F401 (a data source)
from gang import run_gang, start_run
from test_training import LAYOUTS, rows, small_config

from factory_train.run_dir import Attempt, RunDir

# name: (layout, changes)
CASES: dict[str, tuple[str, dict[str, dict[str, str]]]] = {
    **{layout: (layout, {}) for layout in ("single", "accumulated", "ddp2", "fsdp2", "hsdp2x2", "padded3")},
    "recomputed": ("fsdp2", {"parallel": {"activation_checkpoint": "full"}}),
    "chunked": ("fsdp2", {"train": {"loss_impl": "chunked"}}),
    "chunked_ddp": ("ddp2", {"train": {"loss_impl": "chunked"}, "parallel": {"activation_checkpoint": "full"}}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Attempt]:
    root = tmp_path_factory.mktemp("runs")
    attempts = {}
    for name, (layout, changes) in CASES.items():
        cfg = small_config(Path("unused"), layout)
        cfg.data.name, cfg.data.path, cfg.data.packing = "stories", None, "document"
        cfg.train.validate_every, cfg.train.steps = 10, 10
        for section, values in changes.items():
            for key, value in values.items():
                setattr(getattr(cfg, section), key, value)
        attempts[name] = start_run(root, name, cfg)
    run_gang([(attempts[name], LAYOUTS[layout][1]) for name, (layout, _) in CASES.items()])
    return attempts


@pytest.mark.cluster
@pytest.mark.parametrize("name", [name for name in CASES if name != "single"])
def test_packed_training_is_the_same_in_every_layout(runs: dict[str, Attempt], name: str) -> None:
    expected, found = rows(runs["single"]), rows(runs[name])
    assert len(found) == 10
    for key in ("data_hash", "tokens_seen"):
        assert [row[key] for row in found] == [row[key] for row in expected]
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(expected, found, strict=True))
    print(f"{name}: largest relative difference {worst:.2e}")
    assert worst <= 1e-5
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.3
    validated = [[row["loss"] for row in run.run.metrics() if row["kind"] == "validation"] for run in (runs["single"], runs[name])]
    assert validated[1] == pytest.approx(validated[0], rel=1e-5)


@pytest.mark.cluster
def test_the_loss_is_divided_by_targets_not_by_places(runs: dict[str, Attempt]) -> None:
    first = rows(runs["single"])[0]
    assert first["tokens_seen"] < 8 * 32
    # An untrained model gives every token about the same probability.
    assert first["loss"] == pytest.approx(5.55, abs=0.1)


WORDS = (
    *("recipe=llama_fsdp", "plugins=[stories_plugin]", "data.name=stories", "data.packing=document", *command.SMALL, "tracking=none"),
    *("train.deterministic=true", "checkpoint.every_steps=5", "train.validate_every=5"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    shutil.copy(Path(__file__).with_name("stories_plugin.py"), path)
    for words in (
        ("run=whole", "launcher.tasks_per_node=2", "train.steps=15"),
        ("run=parts", "launcher.tasks_per_node=2", "train.steps=5"),
    ):
        done = command.run(*WORDS, *words, cwd=path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "% of the places hold a target" in done.stdout
    return path


@pytest.mark.cluster
def test_a_packed_run_validates_as_it_evaluates_and_its_report_says_how_full_rows_were(folder: Path) -> None:
    run = RunDir.open(folder / "runs/llama_fsdp-whole")
    last = [row for row in run.metrics() if row["kind"] == "validation"][-1]
    evaluation = json.loads((run.evaluation / "step-00000015.json").read_text())
    assert evaluation["loss"] == pytest.approx(last["loss"], rel=1e-6)
    manifest = json.loads((run.data / "manifest.json").read_text())
    validation = manifest["splits"]["validation"]
    assert evaluation["num_tokens"] == validation["num_tokens"] - validation["num_documents"]
    assert evaluation["baselines"] == manifest["baselines"]
    assert manifest["packing"] in (run.path / "report.md").read_text()


@pytest.mark.cluster
@pytest.mark.long
def test_a_packed_run_resumed_at_other_world_sizes_sees_the_same_samples(folder: Path) -> None:
    for steps, layout in ((10, ("launcher.tasks_per_node=4",)), (15, ("parallel=single", "launcher.tasks_per_node=1"))):
        done = command.run(*WORDS, "run=parts", f"train.steps={steps}", *layout, cwd=folder)
        assert done.returncode == 0, done.stdout + done.stderr
    whole, parts = (
        [row for row in RunDir.open(folder / f"runs/llama_fsdp-{name}").metrics() if row["kind"] == "train"] for name in ("whole", "parts")
    )
    assert [row["step"] for row in parts] == list(range(1, 16))
    for key in ("data_hash", "tokens_seen"):
        assert [row[key] for row in parts] == [row[key] for row in whole]


@pytest.mark.cluster
def test_packing_cannot_change_in_a_run(folder: Path) -> None:
    done = command.run(*WORDS, "run=whole", "train.steps=20", "data.packing=concatenate", cwd=folder)
    assert done.returncode == 2
    assert "data.packing" in done.stderr


@pytest.mark.cluster
def test_an_unknown_way_of_packing_is_refused_with_the_nearest(folder: Path) -> None:
    done = command.run(*WORDS, "run=new", "data.packing=documents", "--dry-run", cwd=folder)
    assert done.returncode == 2
    assert "did you mean data.packing=document?" in done.stderr
