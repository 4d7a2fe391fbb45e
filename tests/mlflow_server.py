"""A real MLflow server on this machine, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY
from mlflow.entities import Run
from slurm_cluster import losses, until

from factory_train import storage
from factory_train.run_dir import RunDir
from factory_train.tracking.store import open_store

ENVIRON = os.environ | {"PYTHONPATH": str(REPOSITORY), "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Holds a server with a database of its own below `folder`, and yields its address."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    with open(folder / "log", "w") as log:
        # A session of its own: the server's children end with it.
        process = subprocess.Popen(command, cwd=folder, env=ENVIRON, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not answers(uri):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield uri
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def holds_one_run_with_every_step(uri: str, run: RunDir, steps: int) -> None:
    """Checks what a job of several attempts has sent: one finished run, its whole curve, and its model registered.

    A step is there once, unless two attempts made it: what was sent of the lost one stays in MLflow.
    """
    store = open_store(uri, "factory_train")

    def found() -> list[Run]:
        return store.client.search_runs([store.experiment_id])

    # The syncer of the job sends the rest after the verdict.
    until(lambda: [run.info.status for run in found()] == ["FINISHED"] and store.client.search_model_versions("name = 'llama_fsdp'"))
    (sent,) = found()
    assert sent.info.run_name == run.name
    history = store.client.get_metric_history(sent.info.run_id, "train/loss")
    assert {metric.step: metric.value for metric in sorted(history, key=lambda metric: metric.timestamp)} == losses(run)
    times = Counter(metric.step for metric in history)
    assert sorted(times) == list(range(1, steps + 1))
    made = Counter(
        row["step"] for attempt in run.attempts() for row in storage.read_json_lines(attempt.metrics_path) if row["kind"] == "train"
    )
    assert times <= made
    (version,) = store.client.search_model_versions("name = 'llama_fsdp'")
    assert version.run_id == sent.info.run_id
