"""`status`, `logs` and `stop`: what they say about runs in every state, from the run directory alone."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import synthetic_run
from conftest import REPOSITORY

from factory_train import storage
from factory_train.commands import logs, status, stop
from factory_train.commands.status import run_status
from factory_train.config import Config
from factory_train.console import ProgressView, failure_lines
from factory_train.errors import ConfigError, NotFoundError
from factory_train.launchers.job import Gang, JobSpec
from factory_train.launchers.local import LocalHandle, LocalLauncher
from factory_train.run_dir import Attempt, RunDir
from factory_train.runs_index import all_runs, find_run, index_path, known_roots, remember_root, runs_root

TESTS = Path(__file__).parent


@pytest.fixture
def alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], LocalHandle]]:
    """Starts a job whose only rank does what a script says, and returns once it does."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    handles = []

    def start(script: dict[str, str]) -> LocalHandle:
        attempt = RunDir.create(tmp_path / "runs", "fake", "live").new_attempt(Config(recipe="fake"))
        job = JobSpec(attempt, (Gang("main", 1, 1),), environ={"SCRIPT": json.dumps(script)})
        handles.append(LocalLauncher(worker_module="scripted_worker").submit(job))
        until(lambda: attempt.path.joinpath("started-train-0").is_file() or attempt.verdict())
        return handles[-1]

    yield start
    for handle in handles:
        handle.cancel(now=True)
        assert handle.wait(60)


def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def shown(capsys: pytest.CaptureFixture[str], verb: Callable[[list[str]], int], *words: str) -> str:
    assert verb(list(words)) == 0
    return capsys.readouterr().out


# status


def test_status_of_a_finished_run_tells_the_figures_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, attempt, _ = synthetic_run.new_run(tmp_path)
    synthetic_run.train(attempt, 1, 20)
    synthetic_run.finish(run, attempt)
    text = shown(capsys, status.main, "a", f"runs_root={tmp_path}")
    assert "done, attempt 1" in text
    assert "20 of 20" in text
    assert f"evaluate {run.name}" in text
    (row,) = json.loads(shown(capsys, status.main, "a", "--json", f"runs_root={tmp_path}"))
    assert (row["state"], row["step"], row["steps"], row["tokens_per_s"]) == ("done", 20, 20, 1000.0)
    assert row["validation_loss"] == pytest.approx(row["loss"] + 0.1)


def test_status_counts_only_rows_the_next_attempt_did_not_undo(tmp_path: Path) -> None:
    run, first, config = synthetic_run.new_run(tmp_path)
    synthetic_run.train(first, 1, 19)
    second = run.new_attempt(config)
    with open(second.metrics_path, "a") as file:
        file.write(json.dumps({"kind": "start", "step": 5, "time": 1.0}) + "\n")
    state = run_status(run)
    # The validation at step 10 belongs to work that was lost, and so do the steps after 5.
    assert (state.attempt, state.step, state.validation_loss) == (2, 5, None)
    synthetic_run.train(second, 6, 12, shift=1.0)
    rows = [row for row in run.metrics() if row["kind"] == "validation"]
    assert run_status(run).validation_loss == rows[-1]["loss"]
    assert run_status(run).step == run.metrics()[-1]["step"] == 12


@pytest.mark.parametrize(
    ("outcome", "state"),
    [("preempted", "preempted"), ("interrupted", "interrupted"), ("failed-transient", "failed"), ("killed", "killed")],
)
def test_status_names_how_a_run_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: str, state: str) -> None:
    run, attempt, _ = synthetic_run.new_run(tmp_path)
    attempt.write_verdict(outcome, 1, step=3, reason="because")
    text = shown(capsys, status.main, str(run.path))
    assert f"{state}, attempt 1: because" in text
    assert f"resume {run.name}" in text


def test_a_run_whose_machine_vanished_is_lost_and_one_that_trains_is_running(alive: Callable[..., LocalHandle]) -> None:
    handle = alive({"train:0": "train"})
    run = handle.attempt.run
    until(lambda: run_status(run).step > 0)
    assert run_status(run).state == "running"
    handle.signal(signal.SIGKILL)
    until(lambda: run_status(run).state == "lost")


def test_the_table_shows_every_run_with_its_first_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, good, _ = synthetic_run.new_run(tmp_path, "good")
    good.write_verdict("done", 0, step=20, reason="fine")
    _, bad, _ = synthetic_run.new_run(tmp_path, "bad")
    bad.record_error({"stage": "train", "rank": 3, "host": "node7", "type": "KeyError", "message": "'x'", "hint": "try y"})
    bad.write_verdict("failed-transient", 1, step=None, reason="rank 3: 'x'")
    newer, _, _ = synthetic_run.new_run(tmp_path, "newer")
    storage.write_json(newer.path / "run.json", newer.info() | {"schema_version": 99})
    lines = shown(capsys, status.main, f"runs_root={tmp_path}").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("llama_fsdp-")] == ["UNREADABLE", "DONE", "FAILED"]
    assert "  error: KeyError: 'x'" in lines
    assert any("schema 99" in line for line in lines)


def test_status_of_an_empty_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, status.main, f"runs_root={tmp_path / 'none'}") == f"no runs in {tmp_path / 'none'}\n"


@pytest.mark.parametrize("verb", ["status", "logs", "stop"])
def test_the_verbs_import_nothing_heavy(verb: str) -> None:
    heavy = ("torch", "numpy", "mlflow", "hydra", "omegaconf", "ray")
    program = f"import sys, factory_train.commands.{verb}; print(*(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n")


def test_a_copied_run_directory_answers_without_the_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, attempt, _ = synthetic_run.new_run(tmp_path / "runs")
    synthetic_run.train(attempt, 1, 20)
    storage.write_atomic(attempt.log_path("rank-00000"), "hello\n")
    synthetic_run.finish(run, attempt)
    shutil.copytree(run.path, tmp_path / "copy")
    shutil.rmtree(tmp_path / "runs")
    copy = str(tmp_path / "copy")
    before = sorted((path, path.stat().st_mtime_ns) for path in Path(copy).rglob("*"))
    assert "done, attempt 1" in shown(capsys, status.main, copy)
    assert shown(capsys, logs.main, copy) == "hello\n"
    assert "is not running: done" in shown(capsys, stop.main, copy)
    assert sorted((path, path.stat().st_mtime_ns) for path in Path(copy).rglob("*")) == before


# logs


def test_logs_shows_the_rank_stage_and_attempt_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, first, config = synthetic_run.new_run(tmp_path)
    for attempt in (first, run.new_attempt(config)):
        for name in ("rank-00000", "rank-00001", "prepare"):
            storage.write_atomic(attempt.log_path(name), f"{attempt.number} {name}\n")
    path = str(run.path)
    assert shown(capsys, logs.main, path) == "2 rank-00000\n"
    assert shown(capsys, logs.main, path, "--rank", "1", "--attempt", "1") == "1 rank-00001\n"
    assert shown(capsys, logs.main, path, "--stage=prepare") == "2 prepare\n"
    with pytest.raises(NotFoundError, match="no log 'finish'") as caught:
        logs.main([path, "--stage", "finish"])
    assert caught.value.fix == "there is: prepare, rank-00000, rank-00001"
    with pytest.raises(NotFoundError, match="no attempt 7"):
        logs.main([path, "--attempt", "7"])


def test_following_logs_goes_on_to_the_next_attempt_and_ends_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first, config = synthetic_run.new_run(tmp_path)
    looks: list[str] = []
    monkeypatch.setattr(RunDir, "is_alive", lambda self: looks.append("and it lives") is None)
    # The first half of a two-byte character.
    first.log_path("rank-00000").write_bytes(b"one \xc3")

    def go_on() -> None:
        until(lambda: len(looks) >= 2)
        with open(first.log_path("rank-00000"), "ab") as file:
            file.write(b"\xa9\n")
        second = run.new_attempt(config)
        seen = len(looks)
        until(lambda: len(looks) >= seen + 2)
        storage.write_atomic(second.log_path("rank-00000"), "two\n")
        second.write_verdict("done", 0, step=1, reason="fine")

    writer = threading.Thread(target=go_on)
    writer.start()
    text = shown(capsys, logs.main, str(run.path), "-f")
    writer.join()
    assert text == "one é\n--- attempt 2 ---\ntwo\n"


# stop


def test_stop_saves_and_reports_the_verdict(alive: Callable[..., LocalHandle], capsys: pytest.CaptureFixture[str]) -> None:
    handle = alive({"train:0": "train"})
    text = shown(capsys, stop.main, "live", f"runs_root={handle.attempt.run.path.parent}")
    assert "interrupted: saved at step" in text
    assert "resume fake-live" in text
    assert "is not running: interrupted" in shown(capsys, stop.main, str(handle.attempt.run.path))


def test_stop_now_ends_a_run_that_would_never_save(alive: Callable[..., LocalHandle], capsys: pytest.CaptureFixture[str]) -> None:
    handle = alive({"train:0": "hang"})
    assert "killed" in shown(capsys, stop.main, "--now", str(handle.attempt.run.path))


def test_stop_on_a_copy_leaves_the_running_original_alone(alive: Callable[..., LocalHandle], tmp_path: Path) -> None:
    handle = alive({"train:0": "train"})
    shutil.copytree(handle.attempt.run.path, tmp_path / "copy")
    with pytest.raises(ConfigError, match="this is a copy"):
        stop.main([str(tmp_path / "copy")])
    assert handle.status() == "running"


@pytest.mark.parametrize("verb", [logs.main, stop.main])
def test_a_run_that_is_not_there_is_not_found_and_a_near_name_is_proposed(tmp_path: Path, verb: Callable[[list[str]], int]) -> None:
    synthetic_run.new_run(tmp_path, "abcdef")
    with pytest.raises(NotFoundError, match="no run 'llama_fsdp-abcdeg'") as caught:
        verb(["llama_fsdp-abcdeg", f"runs_root={tmp_path}"])
    assert caught.value.exit_code == 4
    assert caught.value.fix == "did you mean llama_fsdp-abcdef?"


# finding runs


def test_a_run_is_found_by_path_name_id_and_any_unique_end(tmp_path: Path) -> None:
    run, _, _ = synthetic_run.new_run(tmp_path, "xk7")
    synthetic_run.new_run(tmp_path, "zk7")
    for text in (str(run.path), "llama_fsdp-xk7", "xk7"):
        assert find_run(text, tmp_path) == run
    with pytest.raises(ConfigError, match=r"several runs end in 'k7': llama_fsdp-xk7, llama_fsdp-zk7") as caught:
        find_run("k7", tmp_path)
    assert caught.value.exit_code == 2


def test_an_id_goes_before_another_name_that_only_ends_like_it(tmp_path: Path) -> None:
    run, _, _ = synthetic_run.new_run(tmp_path, "7")
    synthetic_run.new_run(tmp_path, "47")
    assert find_run("7", tmp_path) == run


def test_runs_of_folders_used_before_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run, _, _ = synthetic_run.new_run(tmp_path / "far", "q1")
    with pytest.raises(NotFoundError):
        find_run("q1", tmp_path / "near")
    remember_root(tmp_path / "far")
    assert find_run("q1", tmp_path / "near") == run
    near, _, _ = synthetic_run.new_run(tmp_path / "near", "q1")
    assert find_run("q1", tmp_path / "near") == near


@pytest.mark.parametrize("content", ["{", "{}", "[1]", "\udcff"])
def test_a_broken_index_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    index_path().parent.mkdir(parents=True)
    index_path().write_bytes(content.encode(errors="surrogateescape"))
    assert known_roots() == []
    remember_root(tmp_path)
    assert known_roots() == [tmp_path]


def test_a_home_that_cannot_be_written_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    remember_root(tmp_path)
    assert known_roots() == []


def test_the_runs_root_is_the_override_then_the_environment_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert runs_root() == tmp_path / "runs"
    monkeypatch.setenv("FACTORY_TRAIN_RUNS", "/elsewhere")
    assert runs_root() == Path("/elsewhere")
    assert runs_root("mine") == tmp_path / "mine"
    assert all_runs(tmp_path / "runs") == []


# console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def written(attempt: Attempt, stream: io.StringIO) -> str:
    view = ProgressView(attempt, stream)
    view.update()
    view.close()
    return stream.getvalue()


def test_without_a_terminal_progress_is_lines_of_key_and_value(tmp_path: Path) -> None:
    _, attempt, _ = synthetic_run.new_run(tmp_path)
    attempt.record_event("prepare", message="training the tokenizer")
    synthetic_run.train(attempt, 1, 20)
    lines = written(attempt, io.StringIO()).splitlines()
    assert lines[0].split() == ["prepare", "training", "the", "tokenizer"]
    assert [line.split()[0] for line in lines[1:]] == ["step=10/20", "val", "step=20/20", "val"]
    fields = dict(word.split("=") for word in lines[1].split())
    assert fields["tok/s"] == "1.00k"
    assert fields["mem"] == "100MB"
    # Ten steps of 512 tokens at 1000 tokens/s are left.
    assert fields["eta"] == "5.1s"
    assert "mfu" not in fields


def test_a_terminal_gets_one_line_rewritten_within_its_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    _, attempt, _ = synthetic_run.new_run(tmp_path)
    synthetic_run.train(attempt, 1, 20)
    text = written(attempt, Terminal())
    # Only validations and the end take a line of their own.
    assert text.count("\n") == 3
    for update in text.replace("\n", "\r").split("\r"):
        assert len(update.removesuffix("\x1b[K").removeprefix("\x1b[K")) < 40


def test_progress_shows_only_what_is_new(tmp_path: Path) -> None:
    _, attempt, _ = synthetic_run.new_run(tmp_path)
    stream = io.StringIO()
    view = ProgressView(attempt, stream)
    synthetic_run.train(attempt, 1, 10)
    view.update()
    first = stream.getvalue()
    view.update()
    assert stream.getvalue() == first
    with open(attempt.metrics_path, "a") as file:
        file.write('{"kind": "validation", "step": 10, ')
        file.flush()
        view.update()
        assert stream.getvalue() == first
        file.write('"time": 1.0, "loss": 3.0, "bits_per_byte": 1.0}\n')
    view.update()
    assert stream.getvalue() == first + "val step=10 loss=3.0000 bpb=1.0000\n"


def test_a_failure_is_a_few_lines_with_rank_host_hint_and_log(tmp_path: Path) -> None:
    _, attempt, _ = synthetic_run.new_run(tmp_path)
    message = "\n".join(["CUDA error: an illegal memory access", *["compile with TORCH_USE_CUDA_DSA"] * 30])
    attempt.record_error({"stage": "train", "rank": 1, "host": "node7", "type": "RuntimeError", "message": message, "hint": "do this"})
    assert failure_lines(attempt) == [
        "error: RuntimeError: CUDA error: an illegal memory access ...",
        "  first failure: rank 1 on node7",
        "  fix: do this",
        f"  log: {attempt.log_path('rank-00001')}",
    ]
