"""What `sync` has made of a run in the local MLflow store."""

from __future__ import annotations

import json
from pathlib import Path

import command

from factory_train.run_dir import RunDir


def check_one_run(run: RunDir, folder: Path, last: int) -> None:
    """Sends a run, and checks that it is one of MLflow, with each step it has told of once, and one registered version.

    Args:
        folder: the command's, with `runs` in it.
        last: the last of them.
    """
    from mlflow import MlflowClient

    sent = command.run("sync", run.name, cwd=folder)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    told = json.loads((run.path / "tracking.json").read_text())
    client = MlflowClient(f"sqlite:///{folder / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("factory_train")
    found = client.search_runs([experiment.experiment_id], f"tags.`factory_train.run` = '{run.name}'")
    assert [item.info.run_id for item in found] == [told["mlflow_run_id"]]
    history = client.get_metric_history(told["mlflow_run_id"], "train/loss")
    steps_told = [row["step"] for row in run.metrics() if row["kind"] == "train"]
    assert sorted(item.step for item in history) == steps_told
    assert steps_told[-1] == last
    versions = [item.version for item in client.search_model_versions() if item.run_id == told["mlflow_run_id"]]
    assert [str(version) for version in versions] == [str(told["registered_version"])]
