"""One MLflow run over all attempts: the job itself sends to a real server, and is disturbed (run with -m long)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow_server import mlflow_server
from slurm_cluster import ended, job_id, losses, reached, submit, until

from factory_train.tracking.store import open_store

if TYPE_CHECKING:
    from slurm_cluster import Cluster

pytestmark = [pytest.mark.long, pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_disturbed_run_is_one_run_in_mlflow_with_every_step_once(cluster: Cluster, tmp_path: Path) -> None:
    with mlflow_server(tmp_path) as uri:
        run = submit(tmp_path, "sent", "train.steps=100", f"tracking.uri={uri}", "tracking.sync_every_s=1")
        reached(run, 30)
        cluster.slurm("scontrol", "requeue", job_id(run))
        ended(run)
        assert len(run.attempts()) == 2
        store = open_store(uri, "factory_train")
        # The syncer of the job sends the rest after the verdict.
        until(lambda: [item.info.status for item in store.client.search_runs([store.experiment_id])] == ["FINISHED"])
        (found,) = store.client.search_runs([store.experiment_id])
        assert found.info.run_name == run.name
        history = sorted(store.client.get_metric_history(found.info.run_id, "train/loss"), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == list(range(1, 101))
        assert {metric.step: metric.value for metric in history} == losses(run)
        (version,) = store.client.search_model_versions("name = 'llama_fsdp'")
        assert version.run_id == found.info.run_id
