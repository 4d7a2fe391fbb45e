"""Starting a run from another's weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import command
import pytest

from factory_train import cli
from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.origin import RunOrigin
from factory_train.run_dir import RunDir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text and a run `base` that has checkpoints of steps 4 and 8."""
    path = tmp_path_factory.mktemp("init")
    (path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    done = command.run(*words("base"), "train.steps=8", "checkpoint.every_steps=4", cwd=path)
    assert done.returncode == 0, done.stderr
    return path


def words(run: str, *more: str) -> tuple[str, ...]:
    return (
        *("recipe=llama_fsdp", f"run={run}", "data.path=text.txt", *command.SMALL, "tracking=none", "train.validate_every=0"),
        *("launcher.tasks_per_node=1", "parallel=single", "train.steps=4", *more),
    )


def run_of(folder: Path, name: str) -> RunDir:
    return RunDir.open(folder / "runs" / f"llama_fsdp-{name}")


@pytest.mark.cluster
def test_a_run_starts_from_the_weights_of_a_step_of_another_with_a_fresh_optimizer(folder: Path) -> None:
    # A learning rate of next to nothing: what the run saves is what it began with.
    done = command.run(*words("child", "init_from=base@4", "optim.lr=1e-30", "optim.weight_decay=0"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "init        weights of llama_fsdp-base@step-00000004" in done.stdout
    child, base = run_of(folder, "child"), run_of(folder, "base")
    assert child.info()["parent_run"] == "llama_fsdp-base@step-00000004"
    of_child = list_checkpoints(child)[0].manifest().contents.tensors
    of_base = next(info for info in list_checkpoints(base) if info.step == 4).manifest().contents.tensors

    def checksums(tensors: dict, section: str) -> dict[str, list[str]]:
        return {name: [chunk.xxh3 for chunk in record.chunks] for name, record in tensors[section].items()}

    assert checksums(of_child, "weights") == checksums(of_base, "weights")
    assert checksums(of_child, "optimizer/exp_avg") != checksums(of_base, "optimizer/exp_avg")
    rows = [row for row in child.metrics() if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["loss"] < next(row for row in base.metrics() if row["kind"] == "train")["loss"]


@pytest.mark.cluster
@pytest.mark.long
def test_the_same_command_again_continues_even_when_the_origin_is_gone(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    here = tmp_path / "copy"
    assert command.run(*words("twice", "init_from=base"), cwd=here).returncode == 0
    shutil.rmtree(here / "runs/llama_fsdp-base")
    done = command.run(*words("twice", "init_from=base", "train.steps=6"), cwd=here)
    assert done.returncode == 0, done.stderr
    assert "resume      from step 4" in done.stdout
    assert "init  " not in done.stdout
    done = command.run(*words("twice", "init_from=other", "train.steps=8"), cwd=here)
    assert done.returncode == 2
    assert "has begun from llama_fsdp-base@step-00000008" in done.stderr


@pytest.mark.cluster
def test_a_model_that_has_grown_takes_what_fits(folder: Path) -> None:
    done = command.run(*words("grown", "init_from=base", "model.num_layers=3", "init_strict=false"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "9 tensors keep their initial values: weights layers.2." in done.stdout
    (event,) = [event for event in run_of(folder, "grown").attempts()[0].events() if event["event"] == "init"]
    assert len(event["left_alone"]) == 9
    assert all(" layers.2." in name for name in event["left_alone"])


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        (["init_from=bose"], 4, "no run 'bose'"),
        (["init_from=base@7"], 4, "there are: 8, 4"),
        (["init_from=base@"], 2, "no step after '@'"),
        (["init_from=text.txt"], 2, "a checkpoint is a folder of a run"),
        (["init_from=base", "model.dim=64"], 2, "model.dim is 32 there and 64 here"),
        (["init_from=base", "model.tie_embeddings=false"], 2, "model.tie_embeddings=true, or init_strict=false"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_started_from_is_told_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(path.name for path in (folder / "runs").iterdir())
    assert cli.main([*words("never", *more)]) == code
    message = capsys.readouterr().err
    assert text in message
    assert "init_from" in message
    assert "\n  fix: " in message
    assert sorted(path.name for path in (folder / "runs").iterdir()) == before


def test_a_run_that_has_begun_takes_no_other_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert cli.main([*words("base", "init_from=base@4", "train.steps=9")]) == 2
    assert "has begun with weights of its own" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["base", "base@8", "base@step-00000008", "llama_fsdp-base", "a/llama_fsdp-base@8"])
def test_a_reference_typed_again_is_recognised_without_looking(text: str) -> None:
    assert RunOrigin(RunDir(Path("/runs/llama_fsdp-base")), "step-00000008").is_meant_by(text)


@pytest.mark.parametrize("text", ["base@4", "bose", "other/run@8", "hf:base"])
def test_another_reference_is_not_mistaken_for_it(text: str) -> None:
    assert not RunOrigin(RunDir(Path("/runs/llama_fsdp-base")), "step-00000008").is_meant_by(text)


def test_damaged_origin_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "runs", tmp_path / "runs")
    file = tmp_path / "runs/llama_fsdp-base/checkpoints/step-00000008/rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    # Weights are the last section of a file; the optimizer's bytes are of no interest to another run.
    data[-1] ^= 1
    file.write_bytes(data)
    done = command.run(*words("damaged", "init_from=base", f"data.path={folder / 'text.txt'}"), cwd=tmp_path)
    assert done.returncode == 6, done.stdout + done.stderr
    assert "rank-00000.safetensors" in done.stderr
    verdict = json.loads((tmp_path / "runs/llama_fsdp-damaged/attempts/0001/verdict.json").read_text())
    assert verdict["step"] is None
