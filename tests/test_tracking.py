"""What arrives in MLflow: a real sqlite store and a real server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import ENVIRON, free_port, mlflow_server
from synthetic_run import BASELINES, START_S, finish, new_run, train

from factory_train import storage
from factory_train.errors import ConfigError, ExitCode, UnavailableError
from factory_train.report import write_report
from factory_train.run_dir import RunDir, process_started_at
from factory_train.tracking import registration
from factory_train.tracking import store as store_module
from factory_train.tracking import sync as sync_module
from factory_train.tracking.state import load_state, state_path
from factory_train.tracking.store import TrackingStore, default_uri, open_store, without_credentials
from factory_train.tracking.sync import SyncResult, sync


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs root whose database the tests of this module share: making one takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


def opened(result: SyncResult) -> TrackingStore:
    return open_store(result.uri, result.state.experiment)


def curve(result: SyncResult, name: str) -> list[tuple[int, float, int]]:
    """Returns a curve as (step, value, milliseconds), by step."""
    history = opened(result).client.get_metric_history(result.state.mlflow_run_id, name)
    return sorted((point.step, point.value, point.timestamp) for point in history)


def curves(result: SyncResult) -> dict[str, list[tuple[int, float, int]]]:
    return {name: curve(result, name) for name in fetched(result).data.metrics}


def fetched(result: SyncResult) -> Any:
    return opened(result).client.get_run(result.state.mlflow_run_id)


def artifacts(result: SyncResult, folder: str | None = None) -> set[str]:
    return {item.path for item in opened(result).client.list_artifacts(result.state.mlflow_run_id, folder)}


def runs_named(result: SyncResult, run: RunDir) -> list[Any]:
    store = opened(result)
    return list(store.client.search_runs([store.experiment_id], f"tags.`factory_train.run` = '{run.name}'"))


def versions(result: SyncResult, run: RunDir) -> list[Any]:
    found = opened(result).client.search_model_versions("name = 'llama_fsdp'")
    return [version for version in found if version.tags["factory_train.run"] == run.name]


def test_curves_arrive_with_their_steps_and_times(root: Path) -> None:
    run, attempt, _ = new_run(root, "curves")
    train(attempt, 1, 20)
    finish(run, attempt, register=False)
    result = sync(run)
    assert result.rows == 24
    loss = curve(result, "train/loss")
    assert [(step, time_ms) for step, _, time_ms in loss] == [(step, int((START_S + step) * 1000)) for step in range(1, 21)]
    assert loss[0][1] > loss[-1][1] > 4
    assert [step for step, _, _ in curve(result, "validation/loss")] == [10, 20]
    assert curve(result, "evaluation/baseline_unigram") == [(20, BASELINES["unigram"], int((START_S + 20) * 1000))]
    expected = {
        "train/grad_norm",
        "train/tokens_seen",
        "train/skipped_steps",
        "optim/lr",
        "perf/tokens_per_s",
        "perf/step_time_s",
        "mem/bytes",
    }
    assert expected <= fetched(result).data.metrics.keys()


def test_run_page_tells_configuration_lineage_and_result(root: Path) -> None:
    run, attempt, _ = new_run(root, "page", uri=default_uri(root))
    storage.write_json(attempt.path / "code.json", {"git_sha": "ab" * 20, "git_dirty": True, "tree_sha256": "cd" * 32})
    train(attempt, 1, 10)
    finish(run, attempt, register=False)
    storage.write_atomic(run.report_path, "# report\n\n![Loss](report/loss.png)\n")
    storage.write_atomic(run.path / "report" / "loss.png", b"png")
    result = sync(run)
    page = fetched(result)
    assert page.data.params["optim.lr"] == "0.003"
    assert page.data.params["model.rope_scaling"] == "null"
    tags = page.data.tags
    assert tags["factory_train.git_sha"] == "ab" * 20
    assert tags["factory_train.git_dirty"] == "true"
    assert tags["factory_train.data_id"] == "9f" * 32
    assert len(tags["factory_train.tokenizer_sha256"]) == len(tags["factory_train.config_sha256"]) == 64
    assert "3.900 nats/token" in tags["mlflow.note.content"].splitlines()[0]
    assert page.info.status == "FINISHED"
    assert page.info.end_time == int(attempt.verdict().time * 1000)  # type: ignore[union-attr]
    assert {"config.yaml", "report.md", "plots.html", "samples.md", "report", "evaluation"} <= artifacts(result)
    [dataset] = page.inputs.dataset_inputs
    assert dataset.dataset.digest == ("9f" * 32)[:16]


def test_page_of_the_report_samples_and_parts_of_a_step_arrive(root: Path) -> None:
    run, attempt, _ = new_run(root, "seen")
    train(attempt, 1, 20)
    phases = {"data_s": 0.01, "compute_s": 0.4, "reduce_s": 0.05, "optimizer_s": 0.02}
    storage.append_json_line(attempt.metrics_path, {"kind": "train", "step": 21, "time": START_S + 21, "loss": 4.0, **phases})
    attempt.record_error({"rank": 0, "message": "out of memory"})
    write_report(run)
    result = sync(run)
    assert {name: curve(result, f"step/{name}")[0][:2] for name in phases} == {name: (21, value) for name, value in phases.items()}
    assert {"report.html", "report.md", "samples.json", "report"} <= artifacts(result)
    assert not {"plots.html", "ERROR.json"} & artifacts(result)
    assert "attempts/0001/ERROR.json" in artifacts(result, "attempts/0001")
    client = opened(result).client
    page = Path(client.download_artifacts(result.state.mlflow_run_id, "report.html"))
    assert page.read_bytes() == (run.path / "report.html").read_bytes()
    assert "see report.html" in Path(client.download_artifacts(result.state.mlflow_run_id, "report.md")).read_text()
    table = json.loads(Path(client.download_artifacts(result.state.mlflow_run_id, "samples.json")).read_text())
    assert table["columns"] == ["step", "prompt", "text"]
    assert [row[0] for row in table["data"]] == [10, 20]
    assert json.loads(fetched(result).data.tags["mlflow.loggedArtifacts"]) == [{"path": "samples.json", "type": "table"}]


def test_sending_again_changes_nothing(root: Path) -> None:
    run, attempt, _ = new_run(root, "again")
    train(attempt, 1, 20)
    finish(run, attempt)
    first = sync(run)
    before, files = curves(first), artifacts(first)
    assert sync(run).rows == 0
    state_path(run).unlink()
    replay = sync(run)
    assert replay.rows == first.rows
    assert replay.state.mlflow_run_id == first.state.mlflow_run_id
    assert curves(replay) == before
    assert artifacts(replay) == files
    assert len(runs_named(replay, run)) == 1
    assert [str(version.version) for version in versions(replay, run)] == [first.state.registered_version]


def test_two_attempts_are_one_mlflow_run_and_lost_rows_are_not_sent(root: Path) -> None:
    run, attempt, config = new_run(root, "attempts")
    train(attempt, 1, 15, shift=1.0)
    attempt.write_verdict("preempted", ExitCode.PREEMPTED, step=15, reason="asked to stop")
    config.train.steps = 30
    second = run.new_attempt(config)
    train(second, 11, 20)
    finish(run, second, register=False)
    result = sync(run)
    assert len(runs_named(result, run)) == 1
    loss = curve(result, "train/loss")
    assert [step for step, _, _ in loss] == list(range(1, 21))
    assert loss[9][1] > loss[10][1] + 1
    page = fetched(result)
    assert page.data.params["train.steps"] == "20"
    assert page.data.tags["config.changed.2"] == "train.steps: 20 -> 30"
    assert page.data.tags["factory_train.attempt"] == "2"
    assert "attempts/0001/config.yaml" in artifacts(result, "attempts/0001")


def test_status_follows_the_newest_attempt(root: Path) -> None:
    run, attempt, config = new_run(root, "status")
    assert fetched(sync(run)).info.status == "SCHEDULED"
    train(attempt, 1, 5)
    assert fetched(sync(run)).info.status == "FAILED", "nobody is running it and it left no verdict"
    attempt.write_verdict("interrupted", ExitCode.INTERRUPTED, step=5, reason="interrupted by the user")
    result = sync(run)
    assert fetched(result).info.status == "KILLED"
    second = run.new_attempt(config)
    storage.write_json(second.job_path, {"host": socket.gethostname(), "pid": os.getpid(), "pid_started": process_started_at(os.getpid())})
    page = fetched(sync(run))
    assert (page.info.status, page.data.tags["factory_train.outcome"]) == ("RUNNING", "running")


def test_rows_are_sent_as_they_are_written(root: Path) -> None:
    run, attempt, _ = new_run(root, "grows")
    train(attempt, 1, 5)
    with open(attempt.metrics_path, "a") as file:
        file.write('{"kind": "train", "step": 6, "ti')
        file.flush()
        assert sync(run).rows == 5
        file.write(f'me": {START_S + 6}, "loss": 4.5}}\n')
    result = sync(run)
    assert result.rows == 1
    assert curve(result, "train/loss")[-1] == (6, 4.5, int((START_S + 6) * 1000))


def test_values_that_are_not_finite_are_left_out_and_counted(root: Path) -> None:
    run, attempt, _ = new_run(root, "nan")
    rows = [{"loss": None, "grad_norm": 1.0}, {"loss": float("inf"), "grad_norm": float("nan")}, {"loss": 4.0, "grad_norm": 1.0}]
    for step, figures in enumerate(rows, start=1):
        storage.append_json_line(attempt.metrics_path, {"kind": "train", "step": step, "time": START_S + step, **figures})
    result = sync(run)
    assert result.skipped == 3
    assert [step for step, _, _ in curve(result, "train/loss")] == [3]
    assert [step for step, _, _ in curve(result, "train/grad_norm")] == [1, 3]


def test_samples_are_one_page_and_survive_fences_in_the_text(root: Path) -> None:
    run, attempt, _ = new_run(root, "samples")
    train(attempt, 1, 20)
    result = sync(run)
    path = opened(result).client.download_artifacts(result.state.mlflow_run_id, "samples.md")
    text = Path(path).read_text()
    assert text.index("## step 20") < text.index("## step 10")
    assert "````text\n step_20():\n```\n````" in text


def test_model_version_carries_lineage_and_downloads_the_export(root: Path) -> None:
    run, attempt, _ = new_run(root, "model")
    train(attempt, 1, 20)
    finish(run, attempt)
    result = sync(run)
    [version] = versions(result, run)
    assert (result.state.registered_model, result.state.registered_version) == ("llama_fsdp", str(version.version))
    assert version.run_id == result.state.mlflow_run_id
    assert version.source == str(run.export)
    assert version.tags["factory_train.step"] == "20"
    assert version.tags["factory_train.data_id"] == "9f" * 32
    assert version.tags["validation/loss"] == "3.9"
    assert version.tags["baseline/unigram"] == "6.6"
    assert "factory_train.config_sha256" in version.tags
    [output] = fetched(result).outputs.model_outputs
    model = opened(result).client.get_logged_model(output.model_id)
    assert {metric.key: metric.value for metric in model.metrics}["evaluation/loss"] == 3.9


@pytest.mark.parametrize("crash", ["_create_version", "_link_metrics"])
def test_crash_before_the_version_is_recorded_makes_no_second_one(root: Path, monkeypatch: pytest.MonkeyPatch, crash: str) -> None:
    run, attempt, _ = new_run(root, f"crash{crash.replace('_', '-')}")
    train(attempt, 1, 20)
    finish(run, attempt)
    real = getattr(registration, crash)

    def crash_after(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registration, crash, crash_after)
        with pytest.raises(KeyboardInterrupt):
            sync(run)
    state = load_state(run)
    assert state is not None
    assert state.registrations == {}
    result = sync(run)
    assert [str(version.version) for version in versions(result, run)] == [result.state.registered_version]
    assert len(fetched(result).outputs.model_outputs) == 1


def test_later_export_of_the_same_run_is_another_version(root: Path) -> None:
    run, attempt, config = new_run(root, "longer")
    train(attempt, 1, 20)
    finish(run, attempt)
    first = sync(run).state.registered_version
    second = run.new_attempt(config)
    train(second, 21, 30)
    finish(run, second, 30)
    result = sync(run)
    assert sorted(int(version.version) for version in versions(result, run)) == sorted(
        [int(first or 0), int(result.state.registered_version or 0)]
    )
    assert first != result.state.registered_version


def test_deleted_mlflow_run_is_made_anew(root: Path) -> None:
    run, attempt, _ = new_run(root, "deleted")
    train(attempt, 1, 5)
    gone = sync(run)
    opened(gone).client.delete_run(gone.state.mlflow_run_id)
    result = sync(run)
    assert result.state.mlflow_run_id != gone.state.mlflow_run_id
    assert [step for step, _, _ in curve(result, "train/loss")] == [1, 2, 3, 4, 5]


def test_database_that_was_never_finished_is_built_again(tmp_path: Path) -> None:
    left_over = tmp_path / ".mlflow.db.0badcafe.tmp"
    left_over.write_bytes(b"half a database")
    open_store(default_uri(tmp_path), "x")
    assert not left_over.exists()


def test_four_processes_open_a_new_database_at_once(tmp_path: Path) -> None:
    program = "import sys; from factory_train.tracking.store import open_store; print(open_store(sys.argv[1], 'one').experiment_id)"
    command = [sys.executable, "-c", program, default_uri(tmp_path)]
    processes = [
        subprocess.Popen(command, env=ENVIRON, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    finished = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, finished
    assert len({out for out, _ in finished}) == 1
    assert [err for _, err in finished] == [""] * 4
    # No stray ./mlruns or ./mlflow.db of MLflow's own either.
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}


def test_follow_ends_when_everything_is_sent(root: Path) -> None:
    run, attempt, _ = new_run(root, "follow")
    train(attempt, 1, 10)
    results: list[SyncResult] = []
    follower = threading.Thread(target=lambda: results.append(sync(run, follow=True)))
    follower.start()
    deadline = time.monotonic() + 60
    while (state := load_state(run)) is None or state.rows_sent == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert follower.is_alive()
    train(attempt, 11, 20)
    finish(run, attempt)
    follower.join(60)
    assert results, "the follower did not end"
    assert [step for step, _, _ in curve(results[0], "train/loss")] == list(range(1, 21))
    assert fetched(results[0]).info.status == "FINISHED"
    assert results[0].state.registered_version is not None


def test_follow_gives_up_on_a_run_that_vanished_without_a_verdict(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_module, "LOST_AFTER_S", 0.3)
    run, attempt, _ = new_run(root, "vanished")
    train(attempt, 1, 5)
    result = sync(run, follow=True)
    assert fetched(result).data.tags["factory_train.outcome"] == "lost"


def test_unreachable_server_is_exit_69_and_a_later_sync_catches_up(
    tmp_path: Path, server_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run, attempt, _ = new_run(tmp_path, "away", uri=f"http://127.0.0.1:{free_port()}")
    train(attempt, 1, 20)
    finish(run, attempt, register=False)
    with pytest.raises(UnavailableError) as caught:
        sync(run)
    assert caught.value.exit_code == 69
    assert "sync" in (caught.value.fix or "")
    assert sync_module.main([str(run.path), "--follow"]) == 69
    result = sync(run, uri=server_uri)
    assert [step for step, _, _ in curve(result, "train/loss")] == list(range(1, 21))


def test_server_takes_runs_artifacts_and_a_model_whose_files_stay_away(
    tmp_path: Path, server_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run, attempt, _ = new_run(tmp_path, "remote", uri=server_uri.replace("//", "//ann:secret@"))
    train(attempt, 1, 20)
    finish(run, attempt)
    result = sync(run)
    state_path(run).unlink()
    again = sync(run)
    assert again.state.mlflow_run_id == result.state.mlflow_run_id
    [version] = versions(again, run)
    [output] = fetched(again).outputs.model_outputs
    assert version.source == f"models:/{output.model_id}"
    assert version.tags["factory_train.export_path"] == str(run.export)
    assert [step for step, _, _ in curve(again, "train/loss")] == list(range(1, 21))
    assert {"config.yaml", "samples.md", "registration.json"} <= artifacts(again)
    config_yaml = opened(again).client.download_artifacts(again.state.mlflow_run_id, "config.yaml")
    for text in (Path(config_yaml).read_text(), state_path(run).read_text(), str(fetched(again).data)):
        assert "secret" not in text
        assert server_uri in text
    assert "secret" not in "".join(capfd.readouterr())


def test_the_same_run_goes_to_a_second_store_from_the_beginning(root: Path, server_uri: str) -> None:
    run, attempt, _ = new_run(root, "both")
    train(attempt, 1, 10)
    assert sync(run).rows == 12
    result = sync(run, uri=server_uri)
    assert result.rows == 12
    assert result.state.uri == server_uri


def test_tracking_none_sends_nothing_unless_told_where(root: Path) -> None:
    run, attempt, _ = new_run(root, "none", backend="none")
    train(attempt, 1, 5)
    with pytest.raises(ConfigError) as caught:
        sync(run)
    assert "tracking.uri=" in (caught.value.fix or "")
    command = [sys.executable, "-m", "factory_train.tracking.sync", str(run.path), "--follow"]
    assert subprocess.run(command, env=ENVIRON).returncode == 0
    assert not state_path(run).exists()
    assert sync(run, uri=default_uri(root)).rows == 5


def test_plain_folder_as_store_is_refused_with_the_fix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_store(str(tmp_path), "x")
    assert caught.value.fix == f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"


def test_unwritable_database_folder_is_unavailable() -> None:
    with pytest.raises(UnavailableError) as caught:
        open_store("sqlite:////proc/nowhere/mlflow.db", "x")
    assert caught.value.exit_code == 69


def test_credentials_are_never_shown() -> None:
    assert without_credentials("https://ann:secret@host:5000/path") == "https://host:5000/path"
    assert without_credentials("sqlite:////runs/mlflow.db") == "sqlite:////runs/mlflow.db"
    assert store_module.ui_command("https://ann:secret@host") == "open https://host"


def test_verb_sends_every_run_and_says_how_to_look(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from factory_train.commands.sync import main

    runs = tmp_path / "runs"
    for name in ("one", "two"):
        _, attempt, _ = new_run(runs, name, uri=default_uri(root))
        train(attempt, 1, 5)
    _, attempt, _ = new_run(runs, "three", backend="none")
    assert main([f"runs_root={runs}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("5 new rows (5 in all)") == 2
    assert "llama_fsdp-three: tracking is off" in shown
    assert f"mlflow ui --backend-store-uri {default_uri(root)}" in shown
    assert main(["two", f"runs_root={runs}"]) == 0
    assert "0 new rows (5 in all)" in capsys.readouterr().out
    with pytest.raises(ConfigError):
        main(["two", "tracking.url=x"])
