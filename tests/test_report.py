"""report.md and its plots."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from synthetic_run import finish, new_run, train

from factory_train import storage
from factory_train.plots import smoothed
from factory_train.report import write_report


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_finished_run_shows_result_beside_baselines_plots_and_configuration(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    storage.write_json(attempt.path / "plan.json", {"params": {"total": 1_024}, "world_size": 2, "dp_replicate": 1, "dp_shard": 2})
    text = write_report(run).read_text()
    assert "**done**, 20 of 20 steps" in text
    rows = [
        line for line in text.splitlines() if line.startswith("| **this model") or "Kneser-Ney |" in line or line.startswith("| unigram")
    ]
    assert [row.split("|")[2].strip() for row in rows] == ["3.9000", "4.1600", "6.6000"]
    assert "10.2k, 10 a parameter" in text
    assert "2 ranks, dp_replicate 1 x dp_shard 2" in text
    for name in ("loss", "throughput", "lr"):
        assert f"(report/{name}.png)" in text
        width, height = png_size(run.path / "report" / f"{name}.png")
        assert width > 1000
        assert height > 400
    config = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(config)["recipe"] == "llama_fsdp"
    assert f"python -m factory_train export {run.name}" in text
    # A sample that contains a fence is fenced by a longer one.
    assert "````text\ndef »  step_10():\n```\n````" in text


def test_run_without_a_step_has_a_report_without_plots(tmp_path: Path) -> None:
    run, _, _ = new_run(tmp_path)
    text = write_report(run).read_text()
    assert "0 of 20 steps" in text
    assert "Nothing was measured yet" in text
    assert "![" not in text


def test_failed_run_says_what_went_wrong_and_how_to_go_on(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 7)
    attempt.record_error({"rank": 1, "message": "out of memory\nmore", "hint": "train.micro_batch_size=2"})
    attempt.write_verdict("failed-user", 1, step=7, reason="rank 1 failed | out of memory")
    text = write_report(run).read_text()
    assert "**failed-user** after 7 of 20 steps." in text
    assert "> out of memory on rank 1" in text
    assert "> train.micro_batch_size=2" in text
    assert "rank 1 failed \\| out of memory" in text
    assert f"resume {run.name}" in text


def test_attempts_are_listed_and_lost_steps_do_not_count(tmp_path: Path) -> None:
    run, attempt, config = new_run(tmp_path)
    train(attempt, 1, 15)
    attempt.write_verdict("preempted", 75, step=15, reason="asked to stop")
    second = run.new_attempt(config)
    train(second, 11, 12)
    text = write_report(run).read_text()
    assert "12 of 20 steps" in text
    assert "| 1 | preempted | 15 |" in text
    assert "| 2 | lost |" in text


def test_losses_that_are_not_finite_are_left_out_of_the_plot(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    for step, loss in enumerate((8.0, None, None, 7.0), start=1):
        row = {"kind": "train", "step": step, "time": 1.0, "loss": loss, "grad_norm": loss, "skipped": int(loss is None)}
        storage.append_json_line(attempt.metrics_path, row)
    text = write_report(run).read_text()
    assert "| steps skipped (not finite) | 2 |" in text
    assert "from 8.000 to 7.000 nats a token" in text
    assert "2 steps were skipped" in text
    assert png_size(run.path / "report" / "loss.png")


def test_nothing_finite_makes_no_plot_of_it(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    storage.append_json_line(attempt.metrics_path, {"kind": "train", "step": 1, "time": 1.0, "loss": None, "lr": 0.1, "skipped": 1})
    text = write_report(run).read_text()
    assert "(report/loss.png)" not in text
    assert "(report/lr.png)" in text


def test_password_of_the_tracker_is_not_in_the_report(tmp_path: Path) -> None:
    run, _, _ = new_run(tmp_path, uri="https://ann:secret@host")
    text = write_report(run).read_text()
    assert "secret" not in text
    assert "https://host" in text


def test_saves_that_failed_and_the_time_training_waited_are_told(tmp_path: Path) -> None:
    run, attempt, _ = new_run(tmp_path)
    train(attempt, 1, 20)
    finish(run, attempt)
    attempt.record_event("checkpoint", step=10, path="step-00000010")
    attempt.record_event("checkpoint-failed", step=15, message="No space left on device")
    with open(attempt.metrics_path, "a") as file:
        file.write('{"kind": "train", "step": 21, "time": 1.0, "loss": 1.0, "ckpt_stall_s": 2.5}\n')
    text = write_report(run).read_text()
    assert "1 saved, 1 failed; training waited 2.5s for them in all." in text
    assert "- step 15: No space left on device" in text


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_smoothed_curve_does_not_lag_behind_a_straight_line(length: int) -> None:
    line = [3.0 * index for index in range(length)]
    assert smoothed(line) == pytest.approx(line)


def test_report_needs_neither_torch_nor_mlflow() -> None:
    program = "import sys; sys.modules['torch'] = sys.modules['mlflow'] = None; import factory_train.report, factory_train.tracking.sync"
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", program], env=environ).returncode == 0
