"""benchmarks/kernels.py on a machine without a card: the correctness part, and no times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY

from benchmarks.kernel_sections.adamw import shapes_of


def test_without_a_card_it_checks_the_kernels_in_the_interpreter_and_says_what_is_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.kernels", "--sections", "adamw", "pseudogradient", "--json", str(tmp_path / "record.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "timing needs a GPU"
    record = json.loads((tmp_path / "record.json").read_text())
    assert "interpreter" in record["device"]
    assert {row["section"] for row in record["rows"]} == {"adamw", "pseudogradient"}
    assert len(record["rows"]) > 40
    assert all(row["ok"] and row["part"] == "correctness" for row in record["rows"])


def test_models_that_are_timed_are_the_real_ones() -> None:
    for model, numel in {"llama3_1b": 1_235_814_400, "llama3_8b": 8_030_261_248}.items():
        assert sum(shape.numel() for shape in shapes_of(model)) == numel
