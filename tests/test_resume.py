"""A run killed at any moment goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import psutil
import pytest

from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.run_dir import RunDir

STEPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    (path / "text.txt").write_text(Path(subprocess.__file__).read_text())
    return path


def words(run: str, *more: str) -> tuple[str, ...]:
    return (
        *("recipe=llama_fsdp", f"run={run}", "data.path=text.txt", *command.SMALL, "tracking=none", "launcher.tasks_per_node=2"),
        *(f"train.steps={STEPS}", "checkpoint.every_steps=4", "train.validate_every=0", "train.deterministic=true", *more),
    )


def train_rows(folder: Path, run: str) -> list[dict]:
    return [row for row in RunDir.open(folder / "runs" / f"llama_fsdp-{run}").metrics() if row["kind"] == "train"]


def numbers(rows: list[dict]) -> list[tuple]:
    return [(row["step"], row["loss"], row["grad_norm"], row["lr"], row["data_hash"], row["tokens_seen"]) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[dict]:
    done = command.run(*words("undisturbed"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return train_rows(folder, "undisturbed")


def kill_family(process: subprocess.Popen[str]) -> int:
    """Kills a command and everything it started with SIGKILL; returns how many processes that were."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member.pid, signal.SIGKILL)
    process.communicate()
    return len(family)


@pytest.fixture(scope="module")
def killed_run(folder: Path) -> str:
    """Kills every process of a run with SIGKILL at a random step after its first checkpoint."""
    process = command.start(*words("killed"), cwd=folder)
    metrics = folder / "runs/llama_fsdp-killed/attempts/0001/metrics.jsonl"
    # By the second checkpoint the first one is committed: a save waits for the one before it.
    kill_at = random.randrange(10, STEPS - 4)
    deadline = time.monotonic() + 120
    while (len(metrics.read_text().splitlines()) if metrics.exists() else 0) < kill_at:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert kill_family(process) >= 4  # command, supervisor, two ranks
    shutil.copytree(folder / "runs/llama_fsdp-killed", folder / "runs/llama_fsdp-smaller")
    return "killed"


@pytest.mark.cluster
def test_after_sigkill_of_everything_the_curve_is_bit_identical(folder: Path, undisturbed: list[dict], killed_run: str) -> None:
    done = command.run(*words(killed_run), cwd=folder)
    assert done.returncode == 0, done.stderr
    run = RunDir.open(folder / "runs/llama_fsdp-killed")
    resumed_at = next(event["step"] for event in run.last_attempt().events() if event["event"] == "resume")
    assert 4 <= resumed_at < STEPS
    assert numbers(train_rows(folder, killed_run)) == numbers(undisturbed)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("mode", "kills"), [("async", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (("sync", 2), ("async", 15), ("sync", 15)))]
)
def test_killed_at_any_moment_again_and_again_the_curve_is_bit_identical(
    folder: Path, undisturbed: list[dict], mode: str, kills: int
) -> None:
    name, rng = f"{mode}{kills}", random.Random()
    command_words = words(name, f"checkpoint.mode={mode}", "checkpoint.every_steps=1")
    reached = []
    for _ in range(kills):
        process = command.start(*command_words, cwd=folder)
        # From the start of the processes to the end of the run, saves in progress included.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(2.0, 4.5))
        if process.poll() is None:
            kill_family(process)
        run = folder / "runs" / f"llama_fsdp-{name}"
        reached.append(max((info.step for info in list_checkpoints(RunDir(run))), default=0) if run.is_dir() else 0)
    done = command.run(*command_words, cwd=folder)
    assert done.returncode == 0, done.stderr
    print(f"{mode}: killed at checkpoints {reached}")
    assert numbers(train_rows(folder, name)) == numbers(undisturbed)


@pytest.mark.cluster
def test_resume_at_other_world_size_sees_same_batches(folder: Path, undisturbed: list[dict], killed_run: str) -> None:
    done = command.run(*words("smaller", "parallel=single", "launcher.tasks_per_node=1"), cwd=folder)
    assert done.returncode == 0, done.stderr
    found = train_rows(folder, "smaller")
    assert [row["data_hash"] for row in found] == [row["data_hash"] for row in undisturbed]
    worst = max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in zip(undisturbed, found, strict=True))
    assert worst <= 1e-5


@pytest.mark.cluster
@pytest.mark.parametrize(("signum", "code", "outcome"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 75, "preempted")])
def test_a_signal_saves_and_the_same_command_continues(folder: Path, signum: int, code: int, outcome: str) -> None:
    name = f"signal{int(signum)}"
    # Long enough that the signal always comes in the middle.
    more = ("train.steps=100000", "checkpoint.every_steps=100000", "optim.schedule=constant")
    process = command.start(*words(name, *more), cwd=folder)
    metrics = folder / f"runs/llama_fsdp-{name}/attempts/0001/metrics.jsonl"
    deadline = time.monotonic() + 120
    while (len(metrics.read_text().splitlines()) if metrics.exists() else 0) < 6:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    run = RunDir.open(folder / f"runs/llama_fsdp-{name}")
    verdict = run.last_attempt().verdict()
    assert verdict.outcome == outcome
    assert verdict.step >= 6
    assert (run.checkpoints / f"step-{verdict.step:08d}" / "MANIFEST.json").is_file()
    done = command.run(*words(name, *more, f"train.steps={verdict.step + 2}"), cwd=folder)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in train_rows(folder, name)]
    assert steps == list(range(1, verdict.step + 3))


RESUME_WITHOUT_PICKLE = """
import pickle, sys
from pathlib import Path
import torch
from factory_train.launchers.job import WorkerEnv
from factory_train.preemption import StopSignal
from factory_train.recipes.pretrain import train
from factory_train.run_dir import RunDir

def refuse(*args, **kwargs):
    raise AssertionError("something was unpickled")

run = RunDir.open(Path(sys.argv[1]))
config = run.attempts()[0].config()
config.train.steps += 2
attempt = run.new_attempt(config)
class Unpickler(pickle.Unpickler):
    # Other classes inherit from it when they are imported; none is to be used.
    __init__ = refuse

pickle.load = pickle.loads = torch.load = refuse
pickle.Unpickler = Unpickler
assert train(config, attempt, WorkerEnv(str(run.path), attempt.number), StopSignal()) == 0
print(attempt.events()[0]["event"], attempt.events()[0]["step"], run.metrics()[-1]["step"])
"""


@pytest.mark.cluster
@pytest.mark.long
def test_a_run_resumes_while_everything_that_unpickles_raises(folder: Path) -> None:
    settings = ("parallel=single", "launcher.tasks_per_node=1", "train.steps=4")
    done = command.run(*words("unpickled", *settings), cwd=folder)
    assert done.returncode == 0, done.stderr
    run = folder / "runs/llama_fsdp-unpickled"
    done = subprocess.run(
        [sys.executable, "-c", RESUME_WITHOUT_PICKLE, str(run)], env=command.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["resume", "4", "6"]
