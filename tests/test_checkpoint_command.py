"""`checkpoint list|verify|show|diff|prune|mark|unmark` as a person uses it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_cases import flip, new_run, save
from conftest import REPOSITORY

from factory_train import cli
from factory_train.checkpoint.catalog import list_checkpoints
from factory_train.checkpoint.reader import CheckpointReader
from factory_train.commands.progress_bar import ProgressBar
from factory_train.run_dir import RunDir


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with checkpoints of steps 1 to 4."""
    monkeypatch.chdir(tmp_path)
    attempt = new_run(tmp_path / "runs")
    for step, loss in ((1, 4.0), (2, 3.0), (3, 5.0), (4, 6.0)):
        save(attempt, step, keep_last=9, state={"step": step, "seed": step, "metrics": {"validation/loss": loss}})
    return attempt.run


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    found = cli.main(["checkpoint", *words])
    captured = capsys.readouterr()
    assert found == code, captured.out + captured.err
    return captured.out + captured.err


def steps(run: RunDir) -> list[int]:
    return sorted(info.step for info in list_checkpoints(run))


def test_list_tells_size_figure_and_why_each_is_kept(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "mark", "run@1")
    lines = said(capsys, "list", "run").splitlines()
    assert lines[0].split() == ["CHECKPOINT", "STEP", "SIZE", "AGE", "TRY", "RANKS", "VALIDATION/LOSS", "KEPT"]
    assert [line.split()[0] for line in lines[1:]] == [f"step-{step:08d}" for step in (4, 3, 2, 1)]
    assert lines[1].endswith("6.0000           last")
    assert lines[3].endswith("goes with the next save")
    assert lines[4].endswith("marked")
    rows = json.loads(said(capsys, "list", "run", "--json"))
    assert [row["kept"] for row in rows] == [["last"], ["last"], [], ["marked"]]
    assert [row["metric"] for row in rows] == [6.0, 5.0, 3.0, 4.0]


def test_verify_exits_6_and_names_the_file_and_tensor_that_differ(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "verify", "run").count("  ok  ") == 4
    flip(run.checkpoints / "step-00000003" / "rank-00000.safetensors", -1)
    text = said(capsys, "verify", "run", code=6)
    assert text.count("  ok  ") == 3
    assert "step-00000003  DAMAGED: " in text
    assert "rank-00000.safetensors: the bytes of tensor '" in text
    assert "  ok  " in said(capsys, "verify", "run@4")
    said(capsys, "verify", "run@3", code=6)
    said(capsys, "verify", str(run.checkpoints / "step-00000003"), code=6)


def test_show_tells_what_is_in_it(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "show", "run@2", "--tensors")
    for part in ("test-run@step-00000002", "attempt 1, 1 ranks", "optimizer/exp_avg: 6 tensors", 'metrics: {"validation/loss": 3.0}'):
        assert part in text
    assert "weights  embed  float32 [9, 4]  5 chunks in rank-00000.safetensors" in text
    shown = json.loads(said(capsys, "show", "run", "--json"))
    assert (shown["state"]["step"], shown["manifest"]["world_size"]) == (4, 1)


def test_diff_names_the_tensors_that_differ_and_by_how_much(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert "tensors     22 equal, 0 different" in said(capsys, "diff", "run@2", "run@2")
    text = said(capsys, "diff", "run@1", "run@2")
    assert "weights embed  100.0% of elements differ, by at most " in text
    assert "tensors     1 equal, 21 different" in text
    assert "seed: 1 -> 2" in text


def test_prune_removes_what_the_policy_does_not_keep_and_never_the_only_good_one(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert "step-00000001  would go" in said(capsys, "prune", "run", "keep_last=1", "keep_best=1", "--dry-run")
    assert steps(run) == [1, 2, 3, 4]
    flip(run.checkpoints / "step-00000004" / "rank-00000.safetensors", -1)
    said(capsys, "prune", "run", "keep_last=1")
    assert steps(run) == [3, 4]
    with CheckpointReader(run.checkpoints / "step-00000003"):
        assert "nothing to remove" in said(capsys, "prune", "run", "keep_last=1")
    # A good newer one makes it removable, but not while it is read.
    save(run.attempts()[0], 5, keep_last=9)
    with CheckpointReader(run.checkpoints / "step-00000003"):
        assert "step-00000003  stays: somebody reads it" in said(capsys, "prune", "run", "keep_last=1")
    said(capsys, "prune", "run", "keep_last=1")
    assert steps(run) == [5]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "which action?"),
        (["lst", "run"], 2, "did you mean list?"),
        (["list"], 2, "list takes one run or checkpoint, not 0"),
        (["diff", "run"], 2, "checkpoint diff RUN@100 RUN@200"),
        (["show", "run@9"], 4, "there are: 4, 3, 2, 1"),
        (["show", "run@"], 2, "no step after '@'"),
        (["verify", "nosuch"], 4, "no run 'nosuch'"),
        (["prune", "run", "keep_lst=1"], 2, "did you mean keep_last=1?"),
        (["prune", "run", "keep_last=0"], 2, "keep_last=1"),
        (["list", "run", "keep_last=1"], 2, "does not take 'keep_last'"),
        (["show", "file.pt"], 2, "a checkpoint is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_line_with_a_fix(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str
) -> None:
    (tmp_path / "file.pt").write_bytes(b"\x80\x04.")
    said_text = said(capsys, *words, code=code)
    assert text in said_text
    assert said_text.startswith("error: ")
    assert steps(run) == [1, 2, 3, 4]


def test_all_but_diff_works_without_torch(run: RunDir) -> None:
    program = "import sys; sys.modules['torch'] = None; from factory_train import cli; sys.exit(cli.main(sys.argv[1:]))"
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    for words in (
        ["list", "run"],
        ["verify", "run"],
        ["show", "run"],
        ["mark", "run@1"],
        ["unmark", "run@1"],
        ["prune", "run", "--dry-run"],
    ):
        done = subprocess.run([sys.executable, "-c", program, "checkpoint", *words], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_how_far_verification_is_and_the_line_goes_when_it_is_done(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressBar("verify x", 4000) as bar:
        bar.add(1000)
        assert "verify x  [######                  ]  25%  1.00kB of 4.00kB" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
