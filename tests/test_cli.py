"""The command line: verbs, flags, exit codes, and what a mistake looks like."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import command
import pytest

from factory_train import cli, storage
from factory_train.cli import VERBS, split_verb
from factory_train.commands.summary import summary_lines
from factory_train.compose import compose
from factory_train.config import Config, schema_keys
from factory_train.errors import ConfigError, ExitCode
from factory_train.run_dir import Attempt, RunDir, process_started_at
from factory_train.snapshot import write_snapshot

RECIPE = "recipe=llama_fsdp"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a short text in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    return tmp_path


def everything_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command that must fail as a user's mistake does, and returns its exit code and message."""
    code = cli.main(words)
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n  fix: [^\n]+\n", err), err
    return code, err


def frozen_run(folder: Path, name: str, *, alive: bool = False, outcome: str | None = None) -> tuple[RunDir, list[str]]:
    """Makes a run as an earlier command would have left it; returns it and the words of that command."""
    words = [RECIPE, f"run={name}", "data.path=text.txt", *command.SMALL, "tracking=none", "train.steps=50"]
    run = RunDir.create(folder / "runs", "llama_fsdp", name)
    attempt = run.new_attempt(compose(words))
    if alive:
        me = os.getpid()
        storage.write_json(attempt.job_path, {"host": socket.gethostname(), "pid": me, "pid_started": process_started_at(me)})
    if outcome:
        attempt.write_verdict(outcome, 0, step=50, reason="test")
    return run, words


def test_the_first_word_is_a_verb_only_without_equals_sign_or_dash() -> None:
    assert split_verb(["status", "x"]) == ("status", ["x"])
    for words in ([], [RECIPE], ["--dry-run", RECIPE], ["~optim", RECIPE]):
        assert split_verb(words) == (None, words)
    with pytest.raises(ConfigError) as caught:
        split_verb(["statsu"])
    assert caught.value.fix == "did you mean status?"


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        assert cli.main([verb, "-h"]) == ExitCode.OK
        assert f"factory_train {verb}" in capsys.readouterr().out


def test_help_names_every_verb_group_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert cli.main(words) == ExitCode.OK
        text = capsys.readouterr().out
        assert all(word in text for word in (*VERBS, "llama_ddp llama_diloco llama_fsdp", "--multirun", "--dry-run"))
        assert all(f"{key.name}=" in text for key in schema_keys())


def test_dry_run_shows_the_plan_writes_nothing_and_imports_nothing_heavy(folder: Path) -> None:
    before = everything_in(folder)
    program = (
        "import sys; from factory_train.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'ray', 'mlflow', 'numpy', 'tokenizers', 'transformers', 'deepspeed', 'submitit'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else code)"
    )
    words = [RECIPE, "--dry-run", "optim.lr=0.01", "model=llama_small"]
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=folder, env=command.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    for text in (
        "560 steps",
        "2 ranks",
        "model=llama_small",
        "optim.lr: 0.004 -> 0.01",
        "factory_train.worker train",
        f"{folder}/runs/llama_fsdp-",
    ):
        assert text in done.stdout
    assert everything_in(folder) == before


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["recipe=lama_fsdp"], 2, "Did you mean llama_fsdp? available: llama_ddp llama_diloco llama_fsdp"),
        (["train.steps=3"], 2, "no recipe given"),
        ([RECIPE, "train.stepz=3"], 2, "did you mean train.steps=3?"),
        ([RECIPE, "train.steps=many"], 2, "'many' is not a whole number"),
        ([RECIPE, "train.global_batch_tokens=5000"], 2, "not a multiple of train.seq_len=256"),
        ([RECIPE, "parallel.dp_replicate=2", "parallel.dp_shard=2", "launcher.tasks_per_node=2"], 2, "the launcher starts 2"),
        ([RECIPE, "launcher.nodes=2"], 2, "launcher.nodes=1"),
        (
            [RECIPE, "data.path=text.txt", "model.max_seq_len=20000", "train.seq_len=10000", "train.global_batch_tokens=10000"],
            2,
            "longer than the data",
        ),
        ([RECIPE, "data.path=empty.txt"], 2, "is empty"),
        ([RECIPE, "data.path=binary.txt"], 2, "binary"),
        ([RECIPE, "data.path=missing.txt"], 2, "no such file"),
        ([RECIPE, "model.vocab_size=300"], 2, "vocabulary mismatch"),
        ([RECIPE, "model=llama3_70b", "hardware=h100"], 3, "does not fit"),
        (["statsu"], 2, "did you mean status?"),
        ([RECIPE, "--dryrun"], 2, "did you mean --dry-run?"),
        ([RECIPE, "--config-name", "x"], 2, "--config-name"),
        (["resume"], 2, "which run?"),
        (["resume", "nosuchrun"], 4, "nosuchrun"),
        ([RECIPE, "-m", "optim.lr=1e-3,-1e-3"], 2, "optim.lr (optim.lr=-0.001)"),
        ([RECIPE, "-m", "optim.lr=1e-3,2e-3", "run=x"], 2, "one name"),
        ([RECIPE, "-m", "optim.lr=1e-3,2e-3", "wait=false"], 2, "wait=true"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_with_its_fix_and_leaves_no_trace(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    (folder / "empty.txt").write_bytes(b"")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 100)
    before = everything_in(folder)
    found, message = refused(words, capsys)
    assert (found, text in message) == (code, True), message
    assert everything_in(folder) == before


def test_a_process_ends_with_the_exit_code_of_the_mistake(folder: Path) -> None:
    done = command.run("recipe=lama_fsdp", cwd=folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: recipe 'lama_fsdp' not found. Did you mean llama_fsdp?")
    assert "Traceback" not in done.stderr


def test_a_traceback_is_shown_on_request(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FACTORY_TRAIN_TRACEBACK", "1")
    assert cli.main(["recipe=lama_fsdp"]) == 2
    assert "Traceback" in capsys.readouterr().err


@contextlib.contextmanager
def mounted(path: Path, options: str) -> Iterator[None]:
    """Mounts a small tmpfs, or skips the test."""
    path.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs (run the tests as root): {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_a_read_only_mount_is_refused_before_anything_starts(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with mounted(folder / "disk", "size=1m,ro"):
        code, message = refused([RECIPE, "runs_root=disk/runs", *flags], capsys)
    assert code == ExitCode.PREFLIGHT
    assert "read-only" in message
    assert "runs_root=" in message


def test_a_full_disk_is_refused_before_anything_starts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(folder / "disk", "size=1m"):
        code, message = refused([RECIPE, "runs_root=disk/runs"], capsys)
        assert everything_in(folder / "disk") == set()
    assert code == ExitCode.PREFLIGHT
    assert "disk is too full" in message
    assert "runs_root=" in message


def test_a_disk_that_fills_up_on_the_way_leaves_no_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "runs"))

    monkeypatch.setattr("factory_train.launchers.local.LocalLauncher.submit", full)
    code, message = refused([RECIPE, "data.path=text.txt", *command.SMALL], capsys)
    assert code == ExitCode.PREFLIGHT
    assert "the disk is full" in message
    assert list((folder / "runs").iterdir()) == []


def test_a_running_run_is_not_started_twice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, words = frozen_run(folder, "mine", alive=True)
    before = everything_in(folder)
    for command_words in (words, ["resume", "mine"]):
        code, message = refused(command_words, capsys)
        assert code == ExitCode.PREFLIGHT
        assert "already running" in message
        assert f"stop {run.name}" in message
    assert everything_in(folder) == before


def test_a_run_continues_only_with_the_keys_it_was_trained_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, words = frozen_run(folder, "mine")
    before = everything_in(folder)
    for command_words in ([*words, "optim.lr=0.5"], ["resume", "mine", "optim.lr=0.5"]):
        code, message = refused(command_words, capsys)
        assert code == ExitCode.USAGE
        assert "optim.lr: 0.004 -> 0.5" in message
        assert "--force" in message
        assert cli.main([*command_words, "--force", "--dry-run"]) == ExitCode.OK
        assert "optim.lr: 0.004 -> 0.5" in capsys.readouterr().out
    # Where and how long it runs may change, the recipe that says so included.
    assert cli.main([*words, "recipe=llama_ddp", "train.steps=60", "launcher.tasks_per_node=1", "--dry-run"]) == ExitCode.OK
    assert f"{run.name}/attempts/0002" in capsys.readouterr().out
    assert everything_in(folder) == before


def test_a_finished_run_has_nothing_left_to_do_unless_given_more_steps(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, words = frozen_run(folder, "mine", outcome="done")
    for command_words in (words, ["resume", "mine"]):
        assert cli.main(command_words) == ExitCode.OK
        assert "nothing left to do" in capsys.readouterr().out
    assert run.attempt_numbers() == [1]
    assert cli.main(["resume", "mine", "train.steps=100", "--dry-run"]) == ExitCode.OK
    assert "train.steps: 50 -> 100" in capsys.readouterr().out


def test_a_name_shared_by_two_recipes_must_be_told_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen_run(folder, "mine", alive=True)
    other = RunDir.create(folder / "runs", "other", "mine")
    other.new_attempt(compose([RECIPE]))
    code, message = refused(["recipe=llama_ddp", "run=mine"], capsys)
    assert code == ExitCode.USAGE
    assert "other-mine" in message


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cfg", "job", RECIPE, "run=7e3"], "run: '7e3'"),
        ([RECIPE, "--cfg", "job", "--package", "optim"], "weight_decay: 0.1"),
        ([RECIPE, "--cfg", "hydra"], "output_subdir: null"),
        ([RECIPE, "--info", "searchpath"], "Provider"),
        (["--hydra-help"], "--cfg"),
    ],
    ids=["job", "package", "hydra", "info", "hydra-help"],
)
def test_hydras_own_flags_are_answered_by_hydra(folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    before = everything_in(folder)
    assert cli.main(words) == ExitCode.OK
    assert text in capfd.readouterr().out
    assert everything_in(folder) == before


def test_a_sweep_lists_every_point(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([RECIPE, "--multirun", "--dry-run", "optim.lr=1e-3,3e-3", "train.seed=1,2"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        f"[{number}/4] optim.lr={lr} train.seed={seed}"
        for number, (lr, seed) in enumerate(((a, b) for a in (0.001, 0.003) for b in (1, 2)), 1)
    ]


def test_the_closing_summary_shows_the_result_and_where_everything_is(folder: Path) -> None:
    run, _ = frozen_run(folder, "mine", outcome="done")
    (run.checkpoints / "step-00000050").mkdir(parents=True)
    baselines = {"unigram": 3.0, "bigram_kneser_ney": 1.0}
    evaluation = {
        "loss": 2.0,
        "bits_per_byte": 4.0,
        "baselines": baselines,
        "sample": {"prompt": "def ", "text": "main"},
        "checkpoint": "step-00000050",
    }
    storage.write_json(run.evaluation / "step-00000050.json", evaluation)
    (run.path / "report.md").write_text("#")
    attempt = run.last_attempt()
    assert attempt is not None
    text = "\n".join(summary_lines(attempt))
    for part in (
        "llama_fsdp-mine: done, step 50",
        "loss 2.0000 nats a token, perplexity 7.39, 4.0000 bits a byte",
        "unigram 3.0000 nats, 6.0000 bits a byte: beaten",
        "Kneser-Ney bigram 1.0000 nats, 2.0000 bits a byte: not beaten",
        "def |main",
        "runs/llama_fsdp-mine/checkpoints/step-00000050",
        "runs/llama_fsdp-mine/report.md",
        "resume llama_fsdp-mine train.steps=100",
    ):
        assert part in text
    assert "mlflow" not in text


def test_an_interrupt_before_the_run_starts_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("factory_train.checks.check_config", interrupt)
    assert cli.main([RECIPE]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_shows_its_traceback_and_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("factory_train.checks.check_config", lambda _: 1 / 0)
    assert cli.main([RECIPE]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "a bug in factory_train" in err


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    line = f"{sys.executable} -m factory_train --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=command.environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "0"
    assert done.stderr == ""


def test_a_snapshot_names_the_sources_and_survives_a_missing_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = [RunDir.create(tmp_path, "r", name).new_attempt(Config(recipe="r")) for name in ("a", "b")]
    write_snapshot(attempts[0], ["recipe=r"])
    monkeypatch.setenv("PATH", str(tmp_path))
    write_snapshot(attempts[1], ["recipe=r"])
    first, second = (json.loads((attempt.path / "code.json").read_text()) for attempt in attempts)
    assert first["tree_sha256"] == second["tree_sha256"]
    assert first["argv"] == ["recipe=r"]
    assert first["packages"]["torch"]
    assert second["git_sha"] is None
    blocked = Attempt(RunDir(tmp_path / "absent"), 1)
    (tmp_path / "absent").write_text("a file where a folder should be")
    write_snapshot(blocked, [])
