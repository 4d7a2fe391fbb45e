"""From one command to a registered model, and what the run directory is still good for when everything else is gone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import command
import pytest

from factory_train.run_dir import RunDir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("end_to_end")
    (path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    return path


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[RunDir, str]:
    """One small run through all stages, with tracking; its run directory and what it printed."""
    words = ("recipe=llama_fsdp", "run=whole", "data.path=text.txt", *command.SMALL, "train.steps=12", "launcher.tasks_per_node=2")
    done = command.run(*words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return RunDir.open(folder / "runs/llama_fsdp-whole"), done.stdout


@pytest.mark.cluster
def test_the_output_says_what_came_of_it_and_what_to_do_next(finished: tuple[RunDir, str]) -> None:
    run, out = finished
    evaluation = json.loads((run.evaluation / "step-00000012.json").read_text())
    assert f"loss {evaluation['loss']:.4f}" in out
    assert f"{evaluation['bits_per_byte']:.4f} bits a byte" in out
    for baseline in evaluation["baselines"].values():
        assert f"{baseline:.4f}" in out
    for word in ("step=12/12", "export", "report.md", "mlflow ui", "registered", "python -m factory_train resume"):
        assert word in out


@pytest.mark.cluster
def test_validation_in_training_and_evaluation_afterwards_agree(finished: tuple[RunDir, str]) -> None:
    run, _ = finished
    last = [row for row in run.metrics() if row["kind"] == "validation"][-1]
    evaluation = json.loads((run.evaluation / "step-00000012.json").read_text())
    assert evaluation["loss"] == pytest.approx(last["loss"], rel=1e-6)


@pytest.mark.cluster
def test_transformers_loads_the_export_and_says_the_same(finished: tuple[RunDir, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _ = finished
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.export), AutoTokenizer.from_pretrained(run.export)
    evaluation = json.loads((run.evaluation / "step-00000012.json").read_text())
    prompt = tokenizer(evaluation["sample"]["prompt"], return_tensors="pt", add_special_tokens=False)
    new = 8
    tokens = model.generate(**prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens) == evaluation["sample"]["text"]


@pytest.mark.cluster
def test_mlflow_holds_the_run_and_a_registered_version_with_its_lineage(finished: tuple[RunDir, str], folder: Path) -> None:
    from mlflow.tracking import MlflowClient

    run, _ = finished
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    state = json.loads((run.path / "tracking.json").read_text())
    tracked = client.get_run(state["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    history = client.get_metric_history(state["mlflow_run_id"], "train/loss")
    assert [point.step for point in history] == list(range(1, 13))
    (version,) = client.search_model_versions("name='llama_fsdp'")
    assert version.run_id == state["mlflow_run_id"]
    manifest = json.loads((run.data / "manifest.json").read_text())
    assert manifest["id"] in version.tags.values()
    assert run.name in version.tags.values()


@pytest.mark.cluster
def test_a_copied_run_directory_is_enough_for_every_verb_that_reads(finished: tuple[RunDir, str], tmp_path: Path) -> None:
    run, _ = finished
    copy = tmp_path / "somewhere" / run.name
    shutil.copytree(run.path, copy)
    # Out of reach: the original, its prepared data, its tracking database.
    hidden = run.path.parent.with_name("hidden")
    run.path.parent.rename(hidden)
    try:
        status = command.run("status", str(copy), cwd=tmp_path)
        logs = command.run("logs", str(copy), cwd=tmp_path)
        evaluate = command.run("evaluate", str(copy), cwd=tmp_path)
        export = command.run("export", str(copy), f"out={tmp_path / 'exported'}", cwd=tmp_path)
    finally:
        hidden.rename(run.path.parent)
    for done in (status, logs, evaluate, export):
        assert done.returncode == 0, done.stdout + done.stderr
    assert "done" in status.stdout
    loss = json.loads((run.evaluation / "step-00000012.json").read_text())["loss"]
    assert f"{loss:.4f}" in evaluate.stdout
    ours, theirs = run.export / "model.safetensors", tmp_path / "exported" / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.cluster
def test_the_same_command_on_a_finished_run_does_nothing(finished: tuple[RunDir, str], folder: Path) -> None:
    run, _ = finished
    words = ("recipe=llama_fsdp", "run=whole", "data.path=text.txt", *command.SMALL, "train.steps=12", "launcher.tasks_per_node=2")
    done = command.run(*words, cwd=folder)
    assert done.returncode == 0
    assert "nothing left to do" in done.stdout
    assert len(run.attempts()) == 1
