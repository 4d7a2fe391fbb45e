"""One MLflow run over all attempts: the job itself sends to a real server, and is disturbed (run with -m long)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mlflow_server import holds_one_run_with_every_step, mlflow_server
from slurm_cluster import ended, job_id, reached, submit

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
        holds_one_run_with_every_step(uri, run, 100)
