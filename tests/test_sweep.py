"""Sweeps: one run a point, bounded parallelism, one comparison, one parent in MLflow."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import command
import pytest
from synthetic_run import finish, new_run, train

from factory_train import cli, storage
from factory_train.commands.sweep_local import cards_of_slot, exit_code_of
from factory_train.errors import ExitCode, PreflightError
from factory_train.hardware import num_cores
from factory_train.run_dir import RunDir
from factory_train.runs_index import all_runs
from factory_train.sweep import SweepDir, SweepPoint, find_sweep, new_record, sweep_folder, this_process
from factory_train.sweep_report import write_sweep_report
from factory_train.sweep_results import read_results
from factory_train.tracking.store import TrackingStore, default_uri, open_store
from factory_train.tracking.sweeps import PARENT_TAG, send_sweep
from factory_train.tracking.sync import sync

PLUGIN = """
import os, time
from factory_train.registries import SCHEDULES

@SCHEDULES.register("fragile")
def fragile(progress, cfg):
    if cfg.lr == 0.03 and cfg.beta2 == 0.9 and progress > 0.4:
        raise RuntimeError("this combination is unlucky")
    if progress > 0.4 and os.path.exists(GATE):
        time.sleep(0.2)
    return 1.0
"""
RECIPE = "recipe=llama_ddp"
WORDS = (RECIPE, "plugins=[fragile]", "optim.schedule=fragile", "data.path=text.txt", "launcher.tasks_per_node=1", *command.SMALL)
GRID = ("-m", "optim.lr=0.003,0.03", "optim.beta2=0.9,0.95", "launcher.sweep_parallel=2", "train.steps=8", "sweep=grid")


def prepare_folder(path: Path) -> Path:
    (path / "fragile.py").write_text(f"GATE = {str(path / 'slow')!r}\n{PLUGIN}")
    (path / "text.txt").write_text("".join(f"{number}: the quick brown fox, {number * number % 97} times\n" for number in range(500)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_folder(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def swept(folder: Path) -> subprocess.CompletedProcess[str]:
    """A sweep of two by two points, two at once, one of which fails in its training."""
    return command.run(*WORDS, *GRID, cwd=folder)


def grid_of(folder: Path) -> SweepDir:
    sweep = find_sweep(folder / "runs", "grid")
    assert sweep is not None
    return sweep


def table_of(sweep: SweepDir) -> list[dict[str, str]]:
    return list(csv.DictReader(sweep.table_path.read_text().splitlines()))


def store_of(root: Path) -> TrackingStore:
    return open_store(default_uri(root), "factory_train")


def mlflow_runs(root: Path) -> dict[str, Any]:
    """Returns every MLflow run by name; no two have the same."""
    store = store_of(root)
    found = list(store.client.search_runs([store.experiment_id]))
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


@pytest.mark.cluster
def test_each_point_is_a_run_and_a_failing_one_stops_no_other(swept: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert swept.returncode == ExitCode.FAILED, swept.stdout + swept.stderr
    runs = all_runs(folder / "runs")
    assert [run.name for run in runs] == [f"llama_ddp-grid-{number:02d}" for number in (1, 2, 3, 4)], "the sweep's folder is no run"
    assert [run.info()["sweep"] for run in runs] == [{"id": "grid", "point": number} for number in (1, 2, 3, 4)]
    outcomes = [attempt.verdict().outcome for run in runs if (attempt := run.last_attempt())]  # type: ignore[union-attr]
    assert outcomes == ["done", "done", "failed-transient", "done"]
    record = grid_of(folder).record()
    assert [point.state for point in record.points] == ["done", "done", "failed", "done"]
    assert [point.values for point in record.points][2] == {"optim.lr": 0.03, "optim.beta2": 0.9}
    assert record.ended is not None


@pytest.mark.cluster
def test_no_more_points_run_at_once_than_asked_for_and_they_share_the_cores(swept: subprocess.CompletedProcess[str], folder: Path) -> None:
    changes = []
    for run in all_runs(folder / "runs"):
        attempt = run.last_attempt()
        assert attempt is not None
        assert attempt.config().train.num_threads == max(1, num_cores() // 2)
        verdict = attempt.verdict()
        assert verdict is not None
        changes += [(attempt.events()[0]["time"], 1), (verdict.time, -1)]
    running = [sum(step for _, step in sorted(changes)[: count + 1]) for count in range(len(changes))]
    assert max(running) == 2


@pytest.mark.cluster
def test_the_table_is_what_the_runs_say_with_the_failure_in_it(swept: subprocess.CompletedProcess[str], folder: Path) -> None:
    sweep, rows = grid_of(folder), table_of(grid_of(folder))
    assert [row["state"] for row in rows] == ["done", "done", "done", "failed"]
    assert rows[-1]["run"] == "llama_ddp-grid-03"
    assert rows[-1]["loss"] == ""
    assert "this combination is unlucky" in rows[-1]["reason"]
    losses = [float(row["loss"]) for row in rows[:-1]]
    assert losses == sorted(losses)
    for row in rows[:-1]:
        run = RunDir(folder / "runs" / row["run"])
        evaluation = json.loads((run.evaluation / "step-00000008.json").read_text())
        assert (float(row["loss"]), float(row["bits_per_byte"])) == (evaluation["loss"], evaluation["bits_per_byte"])
        attempt = run.last_attempt()
        assert attempt is not None
        assert (float(row["optim.lr"]), float(row["optim.beta2"])) == (attempt.config().optim.lr, attempt.config().optim.beta2)
    best = [line.split() for line in swept.stdout.splitlines() if line.startswith("best")]
    assert [line[1:4] for line in best] == [[rows[0]["optim.lr"], rows[0]["optim.beta2"], f"{losses[0]:.4f}"]]
    assert "failed at step" in swept.stdout
    assert "RuntimeError: this combination is unlucky" in swept.stderr
    report = sweep.report_path.read_text()
    assert "**3 done, 1 failed** of 4 points" in report
    assert f"| best | {rows[0]['optim.lr']} |" in report
    for name in ("values.png", "final.png", "curves.png"):
        assert (sweep.plots / name).read_bytes().startswith(b"\x89PNG")
        assert f"(report/{name})" in report


@pytest.mark.cluster
def test_mlflow_has_one_parent_with_the_comparison_and_four_runs_below_it(swept: subprocess.CompletedProcess[str], folder: Path) -> None:
    runs = mlflow_runs(folder / "runs")
    parent = runs.pop("sweep-llama_ddp-grid")
    assert sorted(runs) == [f"llama_ddp-grid-{number:02d}" for number in (1, 2, 3, 4)]
    assert {run.data.tags[PARENT_TAG] for run in runs.values()} == {parent.info.run_id}
    assert [runs[name].info.status for name in sorted(runs)] == ["FINISHED", "FINISHED", "FAILED", "FINISHED"]
    assert (parent.info.status, parent.data.tags["factory_train.outcome"]) == ("FINISHED", "3 done, 1 failed")
    best = table_of(grid_of(folder))[0]
    assert parent.data.metrics["evaluation/loss"] == float(best["loss"])
    assert parent.data.metrics["sweep/failed"] == 1
    assert parent.data.tags["factory_train.best_run"] == best["run"]
    assert parent.data.tags["factory_train.best.optim.lr"] == best["optim.lr"]
    assert parent.data.params == {"optim.lr": "0.003, 0.03", "optim.beta2": "0.9, 0.95"}
    files = {item.path for item in store_of(folder / "runs").client.list_artifacts(parent.info.run_id)}
    assert files == {"report.md", "plots.html", "table.csv", "sweep.json", "report"}


@pytest.mark.cluster
def test_sending_a_sweep_again_makes_no_second_parent(swept: subprocess.CompletedProcess[str], folder: Path) -> None:
    before = mlflow_runs(folder / "runs")
    for forgotten in (grid_of(folder).path, folder / "runs/llama_ddp-grid-01"):
        (forgotten / "tracking.json").unlink()
    assert cli.main(["sync", "grid", f"runs_root={folder / 'runs'}"]) == ExitCode.OK
    after = mlflow_runs(folder / "runs")
    assert {name: run.info.run_id for name, run in after.items()} == {name: run.info.run_id for name, run in before.items()}
    parent = "sweep-llama_ddp-grid"
    assert after[parent].data.metrics == before[parent].data.metrics
    assert after[parent].info.end_time == before[parent].info.end_time


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Waits until the newest attempt of a run has done so many steps."""
    limit = time.monotonic() + 120
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()
        rows = RunDir(run).metrics() if (run / "attempts").is_dir() else []
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"{run} did not reach step {step}")


@pytest.mark.cluster
def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    prepare_folder(tmp_path)
    words = (*WORDS, "-m", "optim.beta2=0.9,0.95", "train.steps=60", "tracking=none", "sweep=stopped", "launcher.sweep_parallel=1")
    first, second = (tmp_path / "runs" / f"llama_ddp-stopped-{number}" for number in ("01", "02"))
    (tmp_path / "slow").touch()
    process = command.start(*words, cwd=tmp_path)
    wait_for_step(first, 28, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED, out + err
    assert "SIGINT: saving 1 running point, then stopping" in err
    assert [row["state"] for row in table_of(SweepDir(tmp_path / "runs/sweep-llama_ddp-stopped"))] == ["interrupted", "not run"]
    assert "sweep=stopped runs what is not done" in out
    assert not second.exists()
    (tmp_path / "slow").unlink()
    done = command.run(*words, cwd=tmp_path)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    starts = [json.loads(attempt.metrics_path.read_text().splitlines()[0])["step"] for attempt in RunDir(first).attempts()]
    assert starts[0] == 0
    assert 28 <= starts[1] < 60
    assert len(RunDir(second).attempts()) == 1
    assert [row["state"] for row in table_of(SweepDir(tmp_path / "runs/sweep-llama_ddp-stopped"))] == ["done", "done"]
    again = command.run(*words, cwd=tmp_path)
    assert again.returncode == ExitCode.OK, again.stdout + again.stderr
    assert again.stdout.count("done before") == 2
    assert (len(RunDir(first).attempts()), len(RunDir(second).attempts())) == (2, 1), "what is done is not run again"


def test_a_sweep_that_is_ended_from_outside_wants_a_requeue_and_one_that_a_person_ends_does_not() -> None:
    assert [exit_code_of(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == [ExitCode.PREEMPTED, ExitCode.INTERRUPTED]


def test_a_dry_run_of_a_sweep_writes_nothing_and_imports_nothing_heavy(folder: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from factory_train.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'mlflow', 'ray', 'matplotlib'} & set(sys.modules); sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    words = [RECIPE, "-m", "model=glob([llama_t*,llama_sm*])", "optim.lr=1e-3,3e-3", "sweep=dry", "--dry-run"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=tmp_path, env=command.environment(), capture_output=True, text=True)
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")] == [
        f"model={model} optim.lr={lr}" for model in ("llama_small", "llama_tiny") for lr in (0.001, 0.003)
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "message", "fix"),
    [
        (["-m", "optim.lr=1e-3,0.001"], 2, "points 1 and 2 are the same", "give each value once"),
        (["-m", "optim.lr=1e-3,3e-3", "run=x"], 2, "one name cannot name every run", "sweep=NAME"),
        (["-m", "optim.lr=1e-3,3e-3", "wait=false"], 2, "somebody has to wait", "wait=true"),
        (["-m", "tracking.experiment=a,b"], 2, "the points of a sweep cannot differ in this", "tracking.experiment=a"),
        (["-m", "optim.lr=1e-3,-1"], 2, "optim.lr (optim.lr=-1.0): -1.0 must be above zero", "optim.lr"),
        (["-m", "model=glob(zzz*)"], 2, "no run follows from these words", "values in it"),
        (["sweep=x"], 2, "it names a sweep, and this is one run", "--multirun"),
        (["-m", "sweep=a/b", "train.seed=1,2"], 2, "'a/b' cannot name a folder", "sweep=NAME"),
        (
            ["-m", "train.seed=range(1,5)", "launcher.sweep_parallel=3", "launcher.tasks_per_node=1", "hardware.memory_bytes=1500000000"],
            3,
            "3 points at once need about",
            "launcher.sweep_parallel=2",
        ),
    ],
    ids=["same-twice", "run", "wait", "shared-key", "bad-point", "empty", "no-sweep", "name", "memory"],
)
def test_what_cannot_be_swept_is_refused_before_anything_starts(
    words: list[str], code: int, message: str, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([RECIPE, *words]) == code
    error = capsys.readouterr().err
    assert message in error
    assert fix in error.partition("fix: ")[2]
    assert not list(tmp_path.iterdir())


def test_points_that_each_take_a_whole_allocation_do_not_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert cli.main([RECIPE, "-m", "train.seed=1,2", "launcher.sweep_parallel=2"]) == 2
    assert "fix: launcher.sweep_parallel=1; launcher=slurm makes an array of them" in capsys.readouterr().err


def synthetic_sweep(root: Path, values: list[dict[str, Any]], **tracking: Any) -> SweepDir:
    """Returns a sweep with a run that is done for each of its points."""
    record = new_record("llama_fsdp", "made", list(values[0]))
    record.owner, record.ended = this_process(), record.created
    for number, point in enumerate(values, start=1):
        run, attempt, config = new_run(root, record.run_id(number), **tracking)
        config.run, config.sweep = record.run_id(number), record.id
        run.new_attempt(config)
        attempt = run.attempts()[-1]
        train(attempt, 1, 20)
        finish(run, attempt, register=False)
        record.points.append(SweepPoint(number, point, run.name))
    sweep = sweep_folder(root, record)
    sweep.save(record)
    return sweep


def set_result(sweep: SweepDir, number: int, loss: float, bits_per_byte: float, data_id: str | None = None) -> None:
    run = sweep.run(sweep.record().points[number - 1])
    assert run is not None
    path = run.evaluation / "step-00000020.json"
    storage.write_json(path, json.loads(path.read_text()) | {"loss": loss, "bits_per_byte": bits_per_byte})
    if data_id:
        storage.write_json(run.data / "manifest.json", json.loads((run.data / "manifest.json").read_text()) | {"id": data_id})


def test_points_of_other_tokens_are_ranked_by_bits_a_byte(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path, [{"data.tokenizer": name} for name in ("byte", "bpe", "char")])
    for number, figures in enumerate(((1.5, 2.1), (3.9, 1.8), (1.4, 2.0)), start=1):
        set_result(sweep, number, *figures)
    by_loss = read_results(sweep)
    assert ([result.point.number for result in by_loss.points], by_loss.ranked_by) == ([3, 1, 2], "loss")
    for number, name in enumerate(("aa", "bb", "cc"), start=1):
        figures = ((1.5, 2.1), (3.9, 1.8), (1.4, 2.0))[number - 1]
        set_result(sweep, number, *figures, name)
    results = write_sweep_report(sweep)
    assert ([result.point.number for result in results.points], results.ranked_by) == ([2, 3, 1], "bits_per_byte")
    assert "losses a token do not compare" in sweep.report_path.read_text()
    assert sorted(path.name for path in sweep.plots.iterdir()) == ["curves.png", "final.png"], "there is no number to plot against"


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path, [{"optim.lr": value} for value in (0.1, 0.2)])
    set_result(sweep, 1, float("nan"), float("nan"))
    results = write_sweep_report(sweep)
    assert [(result.point.number, result.loss) for result in results.points] == [(2, 3.9), (1, None)]
    assert "its validation loss is not finite" in sweep.report_path.read_text()
    assert (sweep.plots / "values.png").is_file()


def test_points_that_are_sent_at_once_make_one_parent(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path, [{"train.seed": seed} for seed in (1, 2, 3)])
    runs = [run for point in sweep.record().points if (run := sweep.run(point))]
    open_store(default_uri(tmp_path), "factory_train")
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(sync, runs))
    found = mlflow_runs(tmp_path)
    assert sorted(found) == ["llama_fsdp-made-01", "llama_fsdp-made-02", "llama_fsdp-made-03", "sweep-llama_fsdp-made"]
    parent = found["sweep-llama_fsdp-made"].info.run_id
    assert [found[run.name].data.tags[PARENT_TAG] for run in runs] == [parent] * 3
    assert [found[run.name].data.tags["factory_train.sweep_point"] for run in runs] == ["1", "2", "3"]
    # Somebody deletes it in MLflow: sending makes it anew, and the points follow.
    store_of(tmp_path).client.delete_run(parent)
    write_sweep_report(sweep)
    again = send_sweep(sweep, default_uri(tmp_path), "factory_train")
    sync(runs[0])
    assert again != parent
    assert mlflow_runs(tmp_path)[runs[0].name].data.tags[PARENT_TAG] == again


def test_a_sweep_that_is_running_is_not_run_a_second_time(tmp_path: Path) -> None:
    sweep = synthetic_sweep(tmp_path, [{"train.seed": 1}])
    with sweep.held(), pytest.raises(PreflightError, match="is already running"), sweep.held():
        pass
    with sweep.held():
        pass


def test_a_continued_sweep_takes_more_values_but_no_other_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = synthetic_sweep(tmp_path / "runs", [{"train.seed": seed} for seed in (1, 2)])
    monkeypatch.chdir(tmp_path)
    words = ["recipe=llama_fsdp", "-m", "sweep=made", "--dry-run", "--force", "launcher.tasks_per_node=1"]
    assert cli.main([*words, "train.seed=2,3"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "against attempt 2 of llama_fsdp-made-02" in out
    assert "llama_fsdp-made-03/attempts/0001" in out
    assert cli.main([*words, "train.seed=2,3", "optim.lr=1e-3,2e-3"]) == ExitCode.USAGE
    assert "varies train.seed, and this command also optim.lr" in capsys.readouterr().err
    assert cli.main([*words, "optim.schedule=cosine"]) == ExitCode.OK
    assert "[1/1] train.seed=1234" in capsys.readouterr().out, "the value of a key that is left out is the recipe's"
    assert len(sweep.record().points) == 2, "a dry run writes nothing"


def test_points_that_run_at_once_have_cards_of_their_own() -> None:
    assert [cards_of_slot(slot, 2, 2, {})["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["0,1", "2,3"]
    environ = {"CUDA_VISIBLE_DEVICES": "7,5,GPU-1a,2"}
    assert [cards_of_slot(slot, 1, 2, environ)["CUDA_VISIBLE_DEVICES"] for slot in (0, 1)] == ["7", "GPU-1a"]
